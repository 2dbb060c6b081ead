"""Attention of one chunk over another: every backend against softmax written out, whole and in parts that are merged."""

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.chunk_attention import (
    _flash_cuda,
    _flash_cuda_backward,
    chunk_attention,
    chunk_attention_backward,
    select_backend,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ON_CPU = ["dense", "flash_cpu"]
HEADS = [(4, 4, 8), (4, 2, 5), (3, 1, 1)]
PAIRS = [(7, 7, True), (1, 1, True), (300, 300, True), (1, 5, False), (300, 2, False), (13, 700, False)]


def make(queries: int, keys: int, heads: int, kv_heads: int, head_dim: int) -> list[torch.Tensor]:
    """Float64 q, k, v that require gradients, and a gradient of the output."""
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = ((queries, heads, head_dim), (keys, kv_heads, head_dim), (keys, kv_heads, head_dim), (queries, heads, head_dim))
    q, k, v, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad]


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.exp() * (torch.ones(len(q), len(k), dtype=q.dtype).tril() if causal else 1)
    return torch.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdim=True), v), weights.sum(-1).log()


def assert_equal(mine: torch.Tensor, expected: torch.Tensor) -> None:
    assert mine.dtype == torch.float64
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_values_and_gradients_are_those_of_softmax_written_out(backend: str, heads: int, kv_heads: int, head_dim: int) -> None:
    for queries, keys, causal in PAIRS:
        *qkv, grad = make(queries, keys, heads, kv_heads, head_dim)
        expected, expected_lse = written_out(*qkv, causal)
        plain = [x.detach() for x in qkv]
        out, lse = chunk_attention(*plain, causal, backend=backend)
        assert_equal(out, expected)
        assert_equal(lse, expected_lse)
        grads = chunk_attention_backward(grad, *plain, out, lse, causal, backend=backend)
        for mine, reference in zip(grads, torch.autograd.grad(expected, qkv, grad), strict=True):
            assert_equal(mine, reference)


@pytest.mark.parametrize("backend", ON_CPU)
def test_chunks_of_keys_add_up(backend: str) -> None:
    """With the merged result, the gradients of all chunks are those of the whole; with each chunk's own result they are not."""
    *qkv, grad = make(9, 20, 4, 2, 8)
    expected, expected_lse = written_out(*qkv, False)
    references = torch.autograd.grad(expected, qkv, grad)
    q, k, v = (x.detach() for x in qkv)
    pairs = list(zip(k.split((1, 12, 7)), v.split((1, 12, 7)), strict=True))
    outs, lses = (torch.stack(x) for x in zip(*(chunk_attention(q, *pair, False, backend=backend) for pair in pairs), strict=True))
    lse = lses.logsumexp(0)
    merged = ((lses - lse).exp().mT[..., None] * outs).sum(0)
    assert_equal(lse, expected_lse)
    assert_equal(merged, expected)
    grads = [chunk_attention_backward(grad, q, *pair, merged, lse, False, backend=backend) for pair in pairs]
    dq, dk, dv = zip(*grads, strict=True)
    for mine, reference in zip((sum(dq), torch.cat(dk), torch.cat(dv)), references, strict=True):
        assert_equal(mine, reference)
    alone = [
        chunk_attention_backward(grad, q, *pair, *own, False, backend=backend)[0]
        for pair, own in zip(pairs, zip(outs, lses, strict=True), strict=True)
    ]
    assert (sum(alone) - references[0]).abs().max() > 0.1


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_as_exact_as_that_of_sdpa(backend: str, dtype: torch.dtype) -> None:
    plain = [x.detach().to(dtype) for x in make(300, 300, 8, 1, 16)]
    out, lse = chunk_attention(*plain[:3], True, backend=backend)
    grads = chunk_attention_backward(plain[3], *plain[:3], out, lse, True, backend=backend)
    assert out.dtype == dtype and {x.dtype for x in (lse, *grads)} == {torch.float32}
    *qkv, grad = (x.double().requires_grad_() for x in plain)
    expected, expected_lse = written_out(*qkv, True)
    references = (expected, *torch.autograd.grad(expected, qkv, grad))
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-3)
    low = [x.requires_grad_() for x in plain[:3]]
    theirs = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in low), is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    sdpa = (theirs, *torch.autograd.grad(theirs, low, plain[3]))
    for mine, other, reference in zip((out, *grads), sdpa, references, strict=True):
        assert (mine - reference).norm() < 2 * (other - reference).norm()  # 1.52 on a CPU with AVX-512, whose products sum in another order


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_see_weighs_nothing(backend: str, queries: int, keys: int) -> None:
    *qkv, grad = make(queries, keys, 4, 2, 8)
    q, k, v = (x.detach() for x in qkv)
    out, lse = chunk_attention(q, k, v, False, backend=backend)
    assert torch.equal(out, torch.zeros_like(q)) and torch.equal(lse, torch.full((4, queries), -torch.inf, dtype=torch.float64))
    for mine, of in zip(chunk_attention_backward(grad, q, k, v, out, lse, False, backend=backend), (q, k, v), strict=True):
        assert torch.equal(mine, torch.zeros_like(of))


def test_any_strides_are_accepted() -> None:
    *qkv, grad = make(7, 7, 4, 2, 8)
    q, k, v = (x.detach() for x in qkv)
    columns = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (q, k, v)]
    assert all(x.stride(-1) != 1 for x in columns)
    rows = torch.cat((q, k, v), dim=1).split((4, 2, 2), dim=1)
    out, lse = chunk_attention(q, k, v, True)
    ones = grad.new_ones(1).expand_as(grad)
    expected = chunk_attention_backward(ones.contiguous(), q, k, v, out, lse, True)
    padded = torch.cat((lse, lse), dim=1)[:, :7]
    for views in (columns, rows):
        for mine, reference in zip(chunk_attention(*views, True), (out, lse), strict=True):
            assert torch.equal(mine, reference)
        for mine, reference in zip(chunk_attention_backward(ones, *views, out, padded, True), expected, strict=True):
            assert torch.equal(mine, reference)


@pytest.mark.parametrize("causal", [True, False])
def test_memory_does_not_grow_with_the_square_of_the_length(causal: bool) -> None:
    length = 2048
    *qkv, grad = (x.detach().float() for x in make(length, length, 1, 1, 8))
    largest = {}
    for backend in ON_CPU:
        with torch.profiler.profile(profile_memory=True) as profile:
            chunk_attention_backward(grad, *qkv, *chunk_attention(*qkv, causal, backend=backend), causal, backend=backend)
        largest[backend] = max(event.cpu_memory_usage for event in profile.events())
    assert largest["flash_cpu"] < length**2 <= largest["dense"]


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim"),
    [
        (CPU, torch.int32, 64),
        (CUDA, torch.float32, 64),
        (CUDA, torch.bfloat16, 320),
        (CUDA, torch.bfloat16, 12),
        (torch.device("meta"), torch.float32, 64),
    ],
)
def test_what_cannot_run_is_refused_with_what_can(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    accepted = "accepted are cpu with float64, float32, bfloat16 or float16, and cuda with bfloat16 or float16"
    with pytest.raises(ConfigError, match=rf"cannot run on {device.type} in {str(dtype)[6:]} with a head_dim of {head_dim}; {accepted}"):
        select_backend("auto", device, dtype, head_dim)
    assert select_backend("dense", device, dtype, head_dim) == "dense"


def test_the_flash_kernel_of_the_device_is_chosen() -> None:
    assert select_backend("auto", CPU, torch.float64, 7) == "flash_cpu"
    assert select_backend("auto", CUDA, torch.bfloat16, 128) == "flash_cuda"
    with pytest.raises(ConfigError, match=r"\(flash_cuda\) cannot run on cpu"):
        chunk_attention(*make(1, 1, 1, 1, 8)[:3], True, backend="flash_cuda")
    with pytest.raises(ConfigError, match="'fast'; accepted are auto, dense, flash_cpu, flash_cuda"):
        select_backend("fast", CPU, torch.float32, 64)


def test_calls_of_the_cuda_kernels_have_the_arguments_and_results_that_pytorch_declares() -> None:
    """Shapes only, on tensors without values: what can be known of these calls without a GPU."""
    q, k, v, grad = (x.detach().to("meta", torch.bfloat16) for x in make(7, 5, 4, 2, 8))
    out, lse = _flash_cuda(q, k, v, False)
    assert out.shape == q.shape and lse.shape == (4, 7) and lse.dtype == torch.float32
    assert [x.shape for x in _flash_cuda_backward(grad, q, k, v, out, lse, False)] == [q.shape, k.shape, v.shape]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
def test_cuda_kernel_is_as_exact_as_the_definition_in_its_dtype(heads: int, kv_heads: int) -> None:
    for queries, keys, causal in PAIRS:
        *qkv, grad = make(queries, keys, heads, kv_heads, 64)
        expected, expected_lse = written_out(*qkv, causal)
        references = (expected, *torch.autograd.grad(expected, qkv, grad))
        half = [x.detach().to(CUDA, torch.bfloat16) for x in qkv]
        errors = {}
        for backend in ("flash_cuda", "dense"):
            out, lse = chunk_attention(*half, causal, backend=backend)
            torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=1e-2, atol=1e-2)
            grads = chunk_attention_backward(grad.to(CUDA, torch.bfloat16), *half, out, lse, causal, backend=backend)
            errors[backend] = [(x.cpu().double() - y).norm() / y.norm() for x, y in zip((out, *grads), references, strict=True)]
        assert all(mine < 2 * plain + 1e-2 for mine, plain in zip(errors["flash_cuda"], errors["dense"], strict=True))
