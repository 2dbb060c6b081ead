"""Lambda-shaped attention against loops over queries and keys, and against plain attention."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels import lambda_attention as module
from megatron_ext.kernels.lambda_attention import Lambda, lambda_attention
from megatron_ext.kernels.varlen_attention import varlen_attention

THETA = 100.0


def draw(tokens: int, heads: int = 4, kv_heads: int = 2, head_dim: int = 8, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys and values, before rotation."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, heads, head_dim), (tokens, kv_heads, head_dim), (tokens, kv_heads, head_dim)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def turn(x: Tensor, positions: Tensor) -> Tensor:
    """Pairs (i, i + D/2) of [T, H, D] as complex numbers, turned by position."""
    half = x.shape[-1] // 2
    angle = positions[:, None].double() * THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, ends: list[int], sees: Lambda, backend: str | None) -> Tensor:
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(ends)])
    near = turn(q, positions), turn(k, positions)
    far = turn(q, torch.full_like(positions, sees.max_distance)), k
    return lambda_attention(near, far, v, torch.tensor(ends, dtype=torch.int32), sees, backend=backend)


def loops(q: Tensor, k: Tensor, v: Tensor, ends: list[int], sees: Lambda) -> Tensor:
    """The rules as they are told: a query, a head and a key at a time."""
    out = torch.zeros_like(q)
    for begin, end in pairwise(ends):
        for i in range(begin, end):
            keys = [j for j in range(begin, i + 1) if i - j < sees.local_tokens or j - begin < sees.global_tokens]
            for head in range(q.shape[1]):
                kv = head // (q.shape[1] // k.shape[1])
                scores = []
                for j in keys:
                    distance = torch.tensor([min(i - j, sees.max_distance)])
                    turned = turn(q[i, head][None, None], distance)[0, 0]
                    scores.append((turned * k[j, kv]).sum() / q.shape[-1] ** 0.5)
                out[i, head] = torch.stack(scores).softmax(0) @ v[keys, kv]
    return out


SHAPES = [Lambda(2, 4, 4), Lambda(3, 4, 9), Lambda(0, 5, 5), Lambda(6, 1, 3), Lambda(100, 3, 7)]


@pytest.mark.parametrize("backend", ["dense", "blockwise"])
@pytest.mark.parametrize("sees", SHAPES, ids=str)
def test_equals_loops(sees: Lambda, backend: str) -> None:
    ends = [0, 1, 1, 14, 18]
    inputs = draw(ends[-1])
    torch.testing.assert_close(attend(*inputs, ends, sees, backend), loops(*inputs, ends, sees), rtol=1e-10, atol=1e-10)


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=4),
    st.integers(0, 9),
    st.integers(1, 12),
    st.integers(0, 9),
    st.sampled_from([3, 7, 256]),
)
def test_blockwise_equals_dense(lengths: list[int], first: int, last: int, beyond: int, rows: int) -> None:
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    sees, inputs = Lambda(first, last, last + beyond), draw(ends[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROWS", rows)
        blockwise = attend(*inputs, ends, sees, None)
    torch.testing.assert_close(blockwise, attend(*inputs, ends, sees, "dense"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["dense", "blockwise"])
def test_documents_no_longer_than_the_window_see_all_of_themselves(backend: str) -> None:
    ends = [0, 30, 42, 43]
    q, k, v = draw(ends[-1])
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(ends)])
    plain = varlen_attention(turn(q, positions), turn(k, positions), v, torch.tensor(ends, dtype=torch.int32), 30, backend="dense")
    torch.testing.assert_close(attend(q, k, v, ends, Lambda(2, 30, 30), backend), plain, rtol=1e-10, atol=1e-10)
    shorter = attend(q, k, v, ends, Lambda(0, 29, 29), backend)
    assert torch.equal((shorter - plain).abs().amax((1, 2)) > 1e-6, torch.arange(43) == 29), "the one query that sees one key less"


def test_the_limit_of_distances_matters() -> None:
    inputs, ends = draw(40), [0, 40]
    near, far = (attend(*inputs, ends, Lambda(4, 10, limit), None) for limit in (10, 40))
    assert torch.equal(near[:11], far[:11]) and bool(((near - far).abs().amax((1, 2))[11:] > 1e-6).all())


def test_bfloat16_is_as_near_as_its_inputs() -> None:
    inputs, ends, sees = draw(60, dtype=torch.bfloat16), [0, 60], Lambda(4, 16, 16)
    exact = attend(*[x.double() for x in inputs], ends, sees, None)
    out = attend(*inputs, ends, sees, None)
    assert out.dtype == torch.bfloat16 and float((out.double() - exact).abs().max()) < 0.05


def test_memory_does_not_grow_with_the_square_of_the_length() -> None:
    tokens = 100_000
    q, k, v = draw(tokens, heads=1, kv_heads=1, head_dim=2, dtype=torch.float32)
    out = lambda_attention((q, k), (q, k), v, torch.tensor([0, tokens], dtype=torch.int32), Lambda(4, 64, 64))
    assert out.shape == q.shape and bool(out.isfinite().all()), "a matrix of scores would take 40 GB"


def test_no_tokens_and_no_such_backend() -> None:
    inputs = draw(0)
    for backend in ("dense", "blockwise"):
        assert attend(*inputs, [0, 0], Lambda(1, 2, 2), backend).shape == (0, 4, 8)
    with pytest.raises(ConfigError, match=r"'flash'; accepted are dense, blockwise"):
        attend(*inputs, [0, 0], Lambda(1, 2, 2), "flash")
