"""Attention over ranks that have some of the tokens each: what it computes, and what it sends by the cost model's formulas."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatron_ext.kernels.varlen_attention import varlen_attention
from megatron_ext.parallel.sequence import Sharing, divide_heads, shared_attention
from megatron_ext.parallel.split import even_split
from megatron_ext.parallel.world import World
from megatron_ext.planning.cost_model import AttentionShape, CostModel
from tests.distributed import RunRanks
from tests.grids import data_grid

HEAD_DIM = 4


def inputs(tokens: int, heads: int, kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, heads, HEAD_DIM), (tokens, kv_heads, HEAD_DIM), (tokens, kv_heads, HEAD_DIM), (tokens, heads, HEAD_DIM)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def attend_and_backward(q: Tensor, k: Tensor, v: Tensor, upstream: Tensor, lengths: list[int], sharing: Sharing | None) -> list[Tensor]:
    """Output and gradients of q, k and v."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    attend = partial(varlen_attention, cu_seqlens=boundaries, max_seqlen=max(lengths, default=0), backend="dense")
    out = shared_attention(q, k, v, sharing, attend)
    out.backward(upstream)
    return [out.detach(), q.grad, k.grad, v.grad]


def errors_of(world: World, lengths: list[int], heads: int, kv_heads: int) -> tuple[float, int]:
    """Largest error of this rank's part, and the bytes that it sent."""
    grid, whole = data_grid(world), inputs(sum(lengths), heads, kv_heads)
    block = grid.block(world.size)
    assert block is not None
    parts = [even_split(sum(lengths), rank, world.size) for rank in range(world.size)]
    mine = slice(parts[world.rank].start, parts[world.rank].stop)
    sharing = Sharing(block, tuple(part.size for part in parts))
    seen = attend_and_backward(*(x[mine] for x in whole), lengths, sharing)
    expected = attend_and_backward(*whole, lengths, None)
    differences = [float((a - b[mine]).abs().max()) for a, b in zip(seen, expected, strict=True) if a.numel()]
    assert grid.traffic.calls["block", "all_to_all"] == 4, "queries, keys and values are one exchange"
    return max(differences, default=0.0), grid.traffic.sent["block", "all_to_all"]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (6, 3), (6, 2), (5, 1), (12, 3)])
def test_equals_attention_in_one_place(run_ranks: RunRanks, ranks: int, heads: int, kv_heads: int) -> None:
    for lengths in ([1], [2, 7], [7, 1, 13, 2], [5, 0, 11], []):
        for error, _ in run_ranks(ranks, errors_of, lengths, heads, kv_heads):
            assert error < 1e-12


@pytest.mark.parametrize(("ranks", "heads", "kv_heads"), [(2, 4, 4), (2, 4, 1), (4, 8, 2), (4, 4, 4)])
def test_sends_what_the_cost_model_says(run_ranks: RunRanks, ranks: int, heads: int, kv_heads: int) -> None:
    cost = CostModel(100, attention=AttentionShape(1, heads, kv_heads, HEAD_DIM, element_bytes=8))
    there, back = cost.all_to_all_bytes(24, ranks)
    for _, sent in run_ranks(ranks, errors_of, [17, 7], heads, kv_heads):
        assert sent == 2 * (there + back)


def test_without_division_the_cost_model_is_right_in_the_mean(run_ranks: RunRanks) -> None:
    cost = CostModel(100, attention=AttentionShape(1, 4, 2, HEAD_DIM, element_bytes=8))
    sent = [sent for _, sent in run_ranks(4, errors_of, [17, 6], 4, 2)]
    assert sum(sent) / 4 == pytest.approx(2 * sum(cost.all_to_all_bytes(23, 4)))


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), [(32, 8, 32), (6, 2, 4), (5, 1, 4), (12, 3, 8), (7, 7, 4)])
def test_every_query_head_is_with_one_rank_and_its_key_head_too(heads: int, kv_heads: int, ranks: int) -> None:
    division = divide_heads(heads, kv_heads, ranks)
    assert [head for part in division.queries for head in part] == list(range(heads))
    assert all(one.stop >= two.start for one, two in pairwise(division.keys))
    for rank, (queries, keys) in enumerate(zip(division.queries, division.keys, strict=True)):
        readers = division.readers(rank)
        places = readers or [place * len(keys) // len(queries) for place in range(len(queries))]
        assert [keys[place] for place in places] == [head // (heads // kv_heads) for head in queries]
