"""Ring attention on real ranks against dense attention of the whole pack in one process."""

import random
from collections import Counter
from itertools import groupby, pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.varlen_attention import varlen_attention
from megatron_ext.model.checkpointing import recomputed
from megatron_ext.parallel import ring as ring_module
from megatron_ext.parallel.group import Group
from megatron_ext.parallel.ring import ring_attention, visible_rows
from megatron_ext.parallel.split import even_split
from megatron_ext.parallel.world import World
from tests.distributed import RunRanks
from tests.grids import ALONE, data_grid

Chunks = list[list[int]]
LENGTHS = [1, 2, 7, 0, 13, 61, 3]
HEADS = [(4, 4), (4, 2), (4, 1)]
HEAD_DIM = 8


def even(lengths: list[int], size: int) -> Chunks:
    return [[even_split(length, chunk, 2 * size).size for chunk in range(2 * size)] for length in lengths]


def uneven(lengths: list[int], size: int) -> Chunks:
    """Chunks between random places, some of them empty."""
    generator = random.Random(0)
    places = [[0, *sorted(generator.choices(range(length + 1), k=2 * size - 1)), length] for length in lengths]
    return [[after - before for before, after in pairwise(cuts)] for cuts in places]


def packs(size: int) -> dict[str, Chunks]:
    first, last = [3] + [0] * (2 * size - 1), [0] * (size - 1) + [1, 4] + [0] * (size - 1)
    return {
        "even": even(LENGTHS, size),
        "uneven": uneven([23, 5, 0, 41, 1], size),
        "one rank has all": [first],
        "the last rank has more": [last, first, last],
        "no tokens": [[0] * (2 * size)],
        "no documents": [],
    }


def rows_of(chunks: Chunks, rank: int) -> torch.Tensor:
    """Places in the whole pack of the tokens that a rank holds."""
    whole = torch.arange(sum(map(sum, chunks)))
    documents = [document.split(lengths) for document, lengths in zip(whole.split([sum(c) for c in chunks]), chunks, strict=True)]
    return torch.cat([whole[:0], *(part for parts in documents for part in (parts[rank], parts[-1 - rank]))])


def tensors(chunks: Chunks, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q, k, v of the whole pack and a gradient of its output."""
    generator, tokens = torch.Generator().manual_seed(1), sum(map(sum, chunks))
    return [
        torch.randn(tokens, count, HEAD_DIM, generator=generator, dtype=torch.float64).to(dtype)
        for count in (heads, kv_heads, kv_heads, heads)
    ]


def on_ring(chunks: Chunks, ring: Group, whole: list[torch.Tensor], recompute: str = "none") -> list[torch.Tensor]:
    """This rank's rows of the output and of the gradients of q, k and v."""
    *qkv, grad = (x[rows_of(chunks, ring.rank)] for x in whole)
    leaves = [x.requires_grad_() for x in qkv]
    out = recomputed(recompute, lambda q, k, v: ring_attention(q * 1.0, k, v, chunks, ring), *leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def on_one(chunks: Chunks, whole: list[torch.Tensor], backend: str = "dense") -> list[torch.Tensor]:
    """The whole output, and gradients of q, k and v."""
    *qkv, grad = whole
    leaves = [x.clone().requires_grad_() for x in qkv]
    lengths = [sum(document) for document in chunks]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    out = varlen_attention(*leaves, cu_seqlens, max(lengths, default=0), backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def relative_errors(chunks: Chunks, ring: Group, heads: int, kv_heads: int, dtype: torch.dtype) -> list[float]:
    whole = tensors(chunks, heads, kv_heads, dtype)
    mine, expected = on_ring(chunks, ring, whole), on_one(chunks, [x.double() for x in whole])
    assert all(x.dtype == dtype for x in mine)
    parts = [x[rows_of(chunks, ring.rank)] for x in expected]
    assert [x.shape for x in mine] == [x.shape for x in parts]
    return [float((x - part).abs().max() / y.abs().max()) if len(x) else 0.0 for x, part, y in zip(mine, parts, expected, strict=True)]


def all_errors(world: World, degree: int) -> dict[str, list[float]]:
    """Largest relative errors of output and gradients, by what was computed, on a ring of ``degree`` ranks."""
    grid = data_grid(world)
    ring = grid.dp if degree == world.size else grid.block(degree)
    assert ring is not None
    found = {}
    for name, chunks in packs(degree).items():
        for heads, kv_heads in HEADS:
            for dtype in (torch.float64, torch.float32):
                found[f"{name}, {heads} over {kv_heads} heads, {dtype}"] = relative_errors(chunks, ring, heads, kv_heads, dtype)
    return found


def check(found: dict[str, list[float]]) -> None:
    assert len(found) == 6 * 3 * 2
    for name, errors in found.items():
        assert max(errors) <= (1e-12 if "float64" in name else 1e-5), f"{name}: {errors}"


@pytest.mark.parametrize(("ranks", "degree"), [(2, 2), (3, 3), (4, 4), (4, 2)])
def test_outputs_and_gradients_are_those_of_dense_attention_of_the_whole_pack(run_ranks: RunRanks, ranks: int, degree: int) -> None:
    for found in run_ranks(ranks, all_errors, degree):
        check(found)


def test_a_ring_of_one_is_attention() -> None:
    check(all_errors(ALONE, 1))


def wrong_merge(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """The sum of the parts, each normalized by itself."""
    out.add_(part)
    lse.copy_(torch.logaddexp(lse, part_lse))


def sabotaged(world: World) -> dict[str, list[float]]:
    """Errors of output and gradients with one step of the algorithm left out."""
    passing = ring_module._passing
    saboteurs = {
        "nothing": ("_tokens", ring_module._tokens),
        "lse": ("_merge", wrong_merge),
        "last keys": ("_passing", lambda *arguments: list(passing(*arguments))[:-1]),
        "gradients of others": ("_add", lambda *arguments: None),
    }
    found, ring = {}, data_grid(world).dp
    for name, (attribute, replacement) in saboteurs.items():
        with mock.patch.object(ring_module, attribute, replacement):
            found[name] = relative_errors(even([36, 18], world.size), ring, 4, 2, torch.float64)
        world.barrier()
    return found


def test_every_step_is_needed(run_ranks: RunRanks) -> None:
    for found in run_ranks(3, sabotaged):
        assert max(found["nothing"]) < 1e-12
        # The gradient of the values needs the lse, but not the output.
        assert min(found["lse"][:3]) > 1e-2
        assert min(found["last keys"]) > 1e-2
        out, dq, dk, dv = found["gradients of others"]
        assert max(out, dq) < 1e-12 and min(dk, dv) > 1e-2


def squared_errors(world: World) -> list[tuple[float, float]]:
    """Of output and gradients in bfloat16, against float64 of equal inputs: those of the ring and of one process."""
    ring, chunks = data_grid(world).dp, even([300, 5, 64], world.size)
    whole, rows = tensors(chunks, 8, 2, torch.bfloat16), rows_of(chunks, world.rank)
    results = zip(on_ring(chunks, ring, whole), on_one(chunks, whole, "sdpa"), on_one(chunks, [x.double() for x in whole]), strict=True)
    return [(float((x - exact[rows]).square().sum()), float((y - exact)[rows].square().sum())) for x, y, exact in results]


def test_bfloat16_is_as_exact_as_on_one_process(run_ranks: RunRanks) -> None:
    errors = torch.tensor(run_ranks(4, squared_errors)).sum(0).sqrt()
    assert (errors[:, 0] < 1.5 * errors[:, 1]).all(), errors


def changed_documents(world: World, document: int) -> list[bool]:
    """Documents of which an output or gradient on this rank has other bits after one token of ``document`` has other values."""
    ring, chunks = data_grid(world).dp, even(LENGTHS, world.size)
    before, after = tensors(chunks, 4, 2), tensors(chunks, 4, 2)
    token = sum(map(sum, chunks[:document]))
    for x in after:
        x[token] += 1
    mine = [c[world.rank] + c[-1 - world.rank] for c in chunks]
    results = zip(on_ring(chunks, ring, before), on_ring(chunks, ring, after), strict=True)
    parts = zip(*((x != y).split(mine) for x, y in results), strict=True)
    return [any(bool(part.any()) for part in document_parts) for document_parts in parts]


def test_documents_do_not_meet(run_ranks: RunRanks) -> None:
    document = LENGTHS.index(61)
    changed = run_ranks(4, changed_documents, document)
    assert [any(column) for column in zip(*changed, strict=True)] == [n == document for n in range(len(LENGTHS))]
    assert all(rank[document] for rank in changed)


def bytes_sent(world: World) -> tuple[Counter, Counter, Counter]:
    """Bytes sent forward and backward, and calls."""
    grid, chunks = data_grid(world), uneven([23, 5, 0, 41, 1], world.size)
    *qkv, grad = (x[rows_of(chunks, world.rank)] for x in tensors(chunks, 4, 2, torch.bfloat16))
    out = ring_attention(*(x.requires_grad_() for x in qkv), chunks, grid.dp)
    forward = Counter(grid.traffic.sent)
    out.backward(grad)
    return forward, grid.traffic.sent - forward, grid.traffic.calls


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_are_those_of_the_keys_and_values_of_the_other_ranks(run_ranks: RunRanks, size: int) -> None:
    chunks = uneven([23, 5, 0, 41, 1], size)
    elements = [2 * len(rows_of(chunks, rank)) * 2 * HEAD_DIM for rank in range(size)]
    for rank, (forward, backward, calls) in enumerate(run_ranks(size, bytes_sent)):
        keys = 2 * (sum(elements) - elements[(rank + 1) % size])
        assert forward == {("dp", "rotate"): keys}
        assert backward == {("dp", "rotate"): keys + 4 * (sum(elements) - elements[rank])}
        assert calls == {("dp", "rotate"): 3 * (size - 1)}


def order_of_work(world: World) -> list[str]:
    """What one forward pass does, repetitions left out."""
    events: list[str] = []
    rotate, attend = Group.start_rotate, ring_module.chunk_attention

    def spied_rotate(*arguments: object) -> object:
        events.append("rotate")
        return rotate(*arguments)

    def spied_attend(*arguments: object, **options: object) -> object:
        events.append("attend")
        return attend(*arguments, **options)

    chunks = even([37, 16], world.size)
    q, k, v, _ = (x[rows_of(chunks, world.rank)] for x in tensors(chunks, 4, 2))
    with mock.patch.object(Group, "start_rotate", spied_rotate), mock.patch.object(ring_module, "chunk_attention", spied_attend):
        ring_attention(q, k, v, chunks, data_grid(world).dp)
    return [event for event, _ in groupby(events)]


def test_the_next_keys_travel_while_these_are_used(run_ranks: RunRanks) -> None:
    for events in run_ranks(3, order_of_work):
        assert events == ["rotate", "attend"] * 2


def recomputed_bits(world: World) -> list[str]:
    """Ways of activation checkpointing whose output or gradients have other bits than without."""
    ring, chunks = data_grid(world).dp, even(LENGTHS, world.size)
    whole = tensors(chunks, 4, 2, torch.float32)
    plain = on_ring(chunks, ring, whole)
    ways = {way: on_ring(chunks, ring, whole, way) for way in ("full", "selective")}
    return [way for way, results in ways.items() if not all(map(torch.equal, results, plain))]


def test_activation_checkpointing_changes_no_bit(run_ranks: RunRanks) -> None:
    assert run_ranks(4, recomputed_bits) == [[]] * 4


@given(st.integers(1, 4).flatmap(lambda size: st.lists(st.lists(st.integers(0, 3), min_size=2 * size, max_size=2 * size), max_size=3)))
def test_every_visible_pair_is_computed_once_and_no_other(chunks: Chunks) -> None:
    size = len(chunks[0]) // 2 if chunks else 1
    document = torch.arange(len(chunks)).repeat_interleave(torch.tensor([sum(c) for c in chunks], dtype=torch.int64))
    times = torch.zeros(len(document), len(document), dtype=torch.int64)
    for rank in range(size):
        for source in range(size):
            for queries, keys, causal in visible_rows(chunks, rank, source):
                q, k = rows_of(chunks, rank)[queries], rows_of(chunks, source)[keys]
                seen = torch.ones(len(q), len(k), dtype=torch.int64)
                times[q[:, None], k] += seen.tril() if causal else seen
    assert torch.equal(times, (document[:, None] == document).long().tril())


def test_equal_chunks_make_equal_work_in_every_step() -> None:
    chunks = [[4] * 8, [0] * 8, [7] * 8]
    for step in range(4):
        work = set()
        for rank in range(4):
            pairs = visible_rows(chunks, rank, (rank - step) % 4)
            work.add(sum((q.stop - q.start) * (k.stop - k.start) for q, k, _ in pairs))
        assert len(work) == 1


def test_what_cannot_run_is_refused_before_anything_is_sent() -> None:
    ring, x = data_grid().dp, torch.zeros(2, 1, 8, dtype=torch.int32)
    with pytest.raises(ConfigError, match="cannot run on cpu in int32"):
        ring_attention(x, x, x, [[1, 1]], ring)
    with pytest.raises(ConfigError, match="'fast'; accepted are auto, dense"):
        ring_attention(x.double(), x.double(), x.double(), [[1, 1]], ring, backend="fast")
    dense = ring_attention(x.double(), x.double(), x.double(), [[1, 1]], ring, backend="dense")
    assert torch.equal(dense, x.double())
