"""flash-attn's adapter on a package with its signature that computes in plain PyTorch, and on packages that are not what they should be."""

import sys

import pytest
import torch

from megatron_ext.errors import ConfigError
from megatron_ext.kernels import varlen_attention
from megatron_ext.kernels.accelerators import flash_attn
from megatron_ext.kernels.varlen_attention import select_backend
from tests.kernels.accelerators.conftest import Install

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = [3, 0, 1, 9, 2]
# Parameters as flash-attn 2.7 and 2.8 declare them; one document after the other, masked so that the last query sees the last key.
PACKAGE = """
import torch

calls = []

def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
):
    calls.append(dict(max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, causal=causal, deterministic=deterministic))
    outputs = []
    bounds = zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:])
    for first_q, last_q, first_k, last_k in bounds:
        queries = q[first_q:last_q].unflatten(1, (k.shape[1], -1))
        scores = torch.einsum("qgsd,kgd->gsqk", queries, k[first_k:last_k]) / q.shape[-1] ** 0.5
        if causal:
            unseen = torch.ones(last_q - first_q, last_k - first_k, dtype=torch.bool).triu(1 + last_k - first_k - last_q + first_q)
            scores = scores.masked_fill(unseen, float("-inf"))
        outputs.append(torch.einsum("gsqk,kgd->qgsd", scores.softmax(-1), v[first_k:last_k]).flatten(1, 2))
    return torch.cat(outputs)
"""


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the machine had a GPU that flash-attn runs on."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


@pytest.mark.parametrize("causal", [True, False])
def test_arguments_and_results_are_those_of_the_definition(install: Install, causal: bool) -> None:
    install("flash-attn", "2.8.3", {"flash_attn/__init__.py": PACKAGE})
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(LENGTHS), heads, 8) for heads in (6, 2, 2)]
    qkv = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    out = flash_attn.varlen_attention(*qkv, cu_seqlens, max(LENGTHS), causal)
    expected = varlen_attention(*qkv, cu_seqlens, max(LENGTHS), causal=causal, backend="dense")
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(x.square().sum(), qkv) for x in (out, expected)]
    for mine, reference in zip(*grads, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-12)
    other = varlen_attention(*qkv, cu_seqlens, max(LENGTHS), causal=not causal, backend="dense")
    assert (out - other).abs().max() > 0.1
    assert sys.modules["flash_attn"].calls == [dict(max_seqlen_q=9, max_seqlen_k=9, causal=causal, deterministic=False)]


def test_determinism_is_asked_for_as_it_is_of_pytorch(install: Install) -> None:
    install("flash-attn", "2.8.3", {"flash_attn/__init__.py": PACKAGE})
    q = torch.zeros(2, 1, 8)
    torch.use_deterministic_algorithms(True)
    try:
        flash_attn.varlen_attention(q, q, q, torch.tensor([0, 2], dtype=torch.int32), 2, True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert sys.modules["flash_attn"].calls[0]["deterministic"] is True


@pytest.mark.usefixtures("hopper")
def test_the_right_package_is_chosen_only_by_name(install: Install) -> None:
    install("flash-attn", "2.7.4", {"flash_attn/__init__.py": PACKAGE})
    assert select_backend("auto", CUDA, torch.bfloat16, 64)[0] == "varlen"
    assert "flash_attn" not in sys.modules
    assert select_backend("flash_attn", CUDA, torch.bfloat16, 64) == ("flash_attn", "as configured")
    report = flash_attn.status(CUDA)
    assert (report.name, report.version, report.services) == ("flash-attn", "2.7.4", {"attention": None})
    assert flash_attn.status(CPU).services == {"attention": "needs a CUDA device, not cpu"}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (PACKAGE.replace("deterministic=False, ", "", 1), "got an unexpected keyword argument 'deterministic'"),
        (PACKAGE.replace("max_seqlen_k, ", "max_seqlen_k, seqused_k, ", 1), "missing a required argument: 'seqused_k'"),
        ('__version__ = "2.8.3"', "flash_attn.flash_attn_varlen_func is not there"),
        ('raise OSError("undefined symbol: _ZN3c10")', r"cannot be imported \(OSError: undefined symbol: _ZN3c10\)"),
    ],
    ids=["without an argument", "with one more", "without the function", "broken"],
)
def test_a_package_that_differs_is_refused_with_what_differs(install: Install, source: str, reason: str) -> None:
    install("flash-attn", "9.0", {"flash_attn/__init__.py": source})
    able = "able to run here: dense, sdpa, varlen"
    with pytest.raises(ConfigError, match=rf"model.attention is 'flash_attn', which needs the package flash-attn, .*{reason}; {able}"):
        select_backend("flash_attn", CUDA, torch.bfloat16, 64)
    assert reason.replace("\\", "") in (flash_attn.status(CUDA).services["attention"] or "")
    q = torch.zeros(2, 1, 8)
    with pytest.raises(ConfigError, match=reason):
        flash_attn.varlen_attention(q, q, q, torch.tensor([0, 2], dtype=torch.int32), 2, True)


@pytest.mark.usefixtures("hopper")
def test_versions_are_named_where_the_signature_differs(install: Install) -> None:
    install("flash-attn", "9.0", {"flash_attn/__init__.py": "def flash_attn_varlen_func(q): ..."})
    with pytest.raises(ConfigError, match=r"differs from flash-attn 2.7.0 to 2.8.3, for which this adapter is written"):
        select_backend("flash_attn", CUDA, torch.bfloat16, 64)


@pytest.mark.usefixtures("hopper", "install")
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attn, "present", lambda _: False)
    with pytest.raises(ConfigError, match="needs the package flash-attn, which is not installed"):
        select_backend("flash_attn", CUDA, torch.bfloat16, 64)


def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert flash_attn.status(CUDA).services == {"attention": "needs a GPU of compute capability 8.0 or newer"}
