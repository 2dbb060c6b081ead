"""Attention to first tokens: against a loop over all pairs, by every attention kernel of this machine, and where it must be seen."""

import math
from functools import partial

import pytest
import torch

from megatron_ext.kernels.sink_mass import dense, sink_mass
from megatron_ext.kernels.varlen_attention import varlen_attention

PACKS = [[3, 0, 1, 40, 7], [61], [1] * 9, [0, 29, 1, 130, 2, 0]]
HEADS = [(4, 4, 8), (6, 2, 5), (3, 1, 4)]


def make(lengths: list[int], heads: int, kv_heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, the borders of the documents, and which tokens are first."""
    generator = torch.Generator().manual_seed(sum(lengths))
    q, k = (torch.randn(sum(lengths), n, head_dim, generator=generator, dtype=torch.float64) for n in (heads, kv_heads))
    positions = torch.cat([torch.arange(length) for length in lengths])
    return q, k, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), positions == 0


def asked(
    q: torch.Tensor, k: torch.Tensor, boundaries: torch.Tensor, first: torch.Tensor, causal: bool = True, backend: str = "sdpa"
) -> torch.Tensor:
    longest = int(boundaries.diff().max())
    return sink_mass(q, k, first, partial(varlen_attention, cu_seqlens=boundaries, max_seqlen=longest, causal=causal, backend=backend))


def by_pairs(q: torch.Tensor, k: torch.Tensor, lengths: list[int], causal: bool) -> list[list[float]]:
    """The softmax of one query after the other."""
    rows, start, group = [], 0, q.shape[1] // k.shape[1]
    for length in lengths:
        for query in range(start, start + length):
            keys = range(start, query + 1 if causal else start + length)
            rows.append([])
            for head in range(q.shape[1]):
                weights = [math.exp(float(q[query, head] @ k[key, head // group]) / q.shape[-1] ** 0.5) for key in keys]
                rows[-1].append(weights[0] / sum(weights))
        start += length
    return rows


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_the_definition_is_the_softmax_of_every_query(heads: int, kv_heads: int, head_dim: int, causal: bool) -> None:
    lengths = [3, 0, 1, 9, 2]
    q, k, boundaries, _ = make(lengths, heads, kv_heads, head_dim)
    expected = torch.tensor(by_pairs(q, k, lengths, causal), dtype=torch.float64)
    torch.testing.assert_close(dense(q, k, boundaries, causal), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["sdpa", "dense"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_attention_kernels_give_the_definition(heads: int, kv_heads: int, head_dim: int, backend: str, causal: bool) -> None:
    for lengths in PACKS:
        q, k, boundaries, first = make(lengths, heads, kv_heads, head_dim)
        found = asked(q, k, boundaries, first, causal, backend)
        torch.testing.assert_close(found, dense(q, k, boundaries, causal), rtol=1e-12, atol=1e-14)


def test_a_sink_is_seen_in_its_head_and_its_document_alone() -> None:
    q, k, boundaries, first = make([40, 30], 4, 2, 8)
    before = asked(q, k, boundaries, first)
    q[40:, 1], k[40, 0] = 1.0, 20.0
    after = asked(q, k, boundaries, first)
    assert (after[41:, 1] > 0.999).all() and (before[45:, 1] < 0.9).all()
    assert torch.equal(after[:40], before[:40]) and torch.equal(after[:, 2:], before[:, 2:]), "other documents and key heads"
    assert (after[first] == 1).all(), "the first token has nobody else"


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 8e-3), (torch.float32, 1e-6)])
def test_half_precision_is_rounded_once(dtype: torch.dtype, error: float) -> None:
    q, k, boundaries, first = make([29, 1, 200], 4, 2, 16)
    q, k = q.to(dtype), k.to(dtype)
    found = asked(q, k, boundaries, first)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), dense(q.double(), k.double(), boundaries), rtol=0, atol=error)


def test_no_tokens() -> None:
    q, k, boundaries, first = (torch.zeros(0, 4, 8), torch.zeros(0, 2, 8), torch.zeros(2, dtype=torch.int32), torch.zeros(0, dtype=bool))
    assert asked(q, k, boundaries, first).shape == dense(q, k, boundaries).shape == (0, 4)
