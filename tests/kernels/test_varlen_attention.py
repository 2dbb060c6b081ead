"""Packed attention: every backend against the definition, and the choice of one."""

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.errors import ConfigError
from megatron_ext.kernels import varlen_attention
from megatron_ext.kernels.varlen_attention import select_backend

CPU = torch.device("cpu")
GPU_BACKENDS = ["sdpa", "varlen", "flash_attn"]
LENGTHS = [3, 0, 1, 40, 7, 40, 0]


def make(lengths: list[int], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor, int]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), count, head_dim) for count in (heads, kv_heads, kv_heads)]
    qkv = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    return qkv, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), max(lengths, default=0)


def per_document(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], causal: bool) -> torch.Tensor:
    """Softmax attention written out for one document after the other."""
    outputs = [q[:0]]
    group = q.shape[1] // k.shape[1]
    for queries, keys, values in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        for position in range(len(queries)):
            seen = slice(0, position + 1) if causal else slice(None)
            heads = []
            for head in range(q.shape[1]):
                scores = keys[seen, head // group] @ queries[position, head] / q.shape[-1] ** 0.5
                heads.append(scores.softmax(0) @ values[seen, head // group])
            outputs.append(torch.stack(heads)[None])
    return torch.cat(outputs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 8), (6, 2, 5), (3, 1, 1)])
@pytest.mark.parametrize("backend", ["dense", "sdpa"])
def test_values_and_gradients_are_those_of_each_document(backend: str, heads: int, kv_heads: int, head_dim: int, causal: bool) -> None:
    lengths = [3, 0, 1, 9, 2, 9, 0]
    qkv, cu_seqlens, longest = make(lengths, heads, kv_heads, head_dim, torch.float64)
    grad = torch.randn_like(qkv[0])
    out = varlen_attention(*qkv, cu_seqlens, longest, causal=causal, backend=backend)
    expected = per_document(*qkv, lengths, causal)
    assert out.shape == qkv[0].shape
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for mine, reference in zip(torch.autograd.grad(out, qkv, grad), torch.autograd.grad(expected, qkv, grad), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_sdpa_equals_dense_in_lower_precision(dtype: torch.dtype, tolerance: float) -> None:
    qkv, cu_seqlens, longest = make(LENGTHS, 4, 2, 16, dtype)
    outputs = [varlen_attention(*qkv, cu_seqlens, longest, backend=backend) for backend in ("sdpa", "dense")]
    assert outputs[0].dtype == dtype
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)
    grads = [torch.autograd.grad(out, qkv, torch.ones_like(out)) for out in outputs]
    for mine, reference in zip(*grads, strict=True):
        torch.testing.assert_close(mine, reference, rtol=tolerance, atol=3 * tolerance)


@pytest.mark.parametrize("backend", ["dense", "sdpa"])
def test_documents_do_not_meet(backend: str) -> None:
    qkv, cu_seqlens, longest = make(LENGTHS, 4, 2, 8, torch.float64)
    before = varlen_attention(*qkv, cu_seqlens, longest, backend=backend)
    with torch.no_grad():
        for tensor in qkv:
            tensor[cu_seqlens[3]] += 1
    changed = (varlen_attention(*qkv, cu_seqlens, longest, backend=backend) - before).abs().amax((1, 2)).split(LENGTHS)
    assert [bool(part.any()) for part in changed] == [False, False, False, True, False, False, False]
    one = torch.tensor([0, sum(LENGTHS)], dtype=torch.int32)
    assert (varlen_attention(*qkv, one, sum(LENGTHS), backend=backend) - before).abs().max() > 0.1


@pytest.mark.parametrize("backend", ["dense", "sdpa"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1]])
def test_hardly_any_tokens_still_have_gradients(lengths: list[int], backend: str) -> None:
    qkv, cu_seqlens, longest = make(lengths, 4, 2, 8, torch.float32)
    out = varlen_attention(*qkv, cu_seqlens, longest, backend=backend)
    assert out.shape == (sum(lengths), 4, 8)
    assert all(grad.shape == tensor.shape for grad, tensor in zip(torch.autograd.grad(out.sum(), qkv), qkv, strict=True))


def test_views_of_one_projection_are_accepted() -> None:
    (q, k, v), cu_seqlens, longest = make(LENGTHS, 4, 2, 8, torch.float32)
    views = torch.cat((q, k, v), dim=1).split((4, 2, 2), dim=1)
    assert not views[0].is_contiguous()
    expected = varlen_attention(q, k, v, cu_seqlens, longest, backend="sdpa")
    torch.testing.assert_close(varlen_attention(*views, cu_seqlens, longest, backend="sdpa"), expected)


def test_key_heads_are_not_copied() -> None:
    """One document with many query heads over one key head stays on PyTorch's fused kernel."""
    qkv, cu_seqlens, longest = make([64], 8, 1, 16, torch.float32)
    with torch.profiler.profile() as profile:
        varlen_attention(*qkv, cu_seqlens, longest, backend="sdpa")
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert not names & {"aten::repeat_interleave", "aten::expand", "aten::repeat"}


def test_the_choice_says_why() -> None:
    assert select_backend("dense", CPU, torch.float64, 7) == ("dense", "as configured")
    name, reason = select_backend("auto", CPU, torch.float32, 64)
    assert name == "sdpa"
    assert reason == "auto: varlen needs a CUDA device, not cpu"


@pytest.mark.parametrize("name", ["varlen", "flash_attn"])
def test_what_cannot_run_here_is_refused_with_what_can(name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"model.attention is '{name}', which needs a CUDA device, not cpu; able to run here: dense, sdpa"
    ):
        select_backend(name, CPU, torch.bfloat16, 64)
    qkv, cu_seqlens, longest = make([3], 1, 1, 8, torch.float32)
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        varlen_attention(*qkv, cu_seqlens, longest, backend=name)


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'fast'; accepted are auto, dense, sdpa, varlen, flash_attn"):
        select_backend("fast", CPU, torch.float32, 64)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [
        (torch.float32, 64, "needs bfloat16 or float16, not float32"),
        (torch.bfloat16, 320, "up to 256, not 320"),
        (torch.float16, 12, "not 12"),
    ],
)
def test_limits_of_the_gpu_kernels(dtype: torch.dtype, head_dim: int, reason: str) -> None:
    cuda = torch.device("cuda")
    with pytest.raises(ConfigError, match=reason):
        select_backend("varlen", cuda, dtype, head_dim)
    assert select_backend("auto", cuda, dtype, head_dim)[0] == "sdpa"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_gpu_backends_are_as_exact_as_the_definition_in_their_dtype(backend: str) -> None:
    device = torch.device("cuda")
    try:
        select_backend(backend, device, torch.bfloat16, 64)
    except ConfigError as error:
        pytest.skip(str(error))
    exact, cu_seqlens, longest = make(LENGTHS, 8, 2, 64, torch.float64)
    half = [tensor.detach().to(device, torch.bfloat16).requires_grad_() for tensor in exact]
    expected = varlen_attention(*exact, cu_seqlens, longest, backend="dense")
    results = {}
    for name in (backend, "dense"):
        out = varlen_attention(*half, cu_seqlens.to(device), longest, backend=name)
        grads = torch.autograd.grad(out, half, torch.ones_like(out))
        references = (expected, *torch.autograd.grad(expected, exact, torch.ones_like(expected), retain_graph=True))
        results[name] = [
            F.mse_loss(mine.cpu().double(), reference).sqrt() for mine, reference in zip((out, *grads), references, strict=True)
        ]
    for mine, dense in zip(results[backend], results["dense"], strict=True):
        assert mine < 1.5 * dense + 1e-3
