from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.errors import ConfigError
from megatron_ext.parallel.grid import Grid, GridShape, grid_shape
from megatron_ext.parallel.options import ParallelOptions
from megatron_ext.parallel.world import World
from tests.distributed import RunRanks

SIZES = st.integers(1, 5)


@given(pp=SIZES, dp=SIZES, tp=SIZES)
def test_coordinates_and_ranks_are_inverse_and_tensor_neighbours_are_adjacent(pp: int, dp: int, tp: int) -> None:
    shape = GridShape(pp, dp, tp)
    assert [shape.coordinates(rank) for rank in range(shape.size)] == list(product(range(pp), range(dp), range(tp)))
    assert [shape.rank(*shape.coordinates(rank)) for rank in range(shape.size)] == list(range(shape.size))


def test_data_parallelism_is_what_is_left() -> None:
    assert grid_shape(ParallelOptions(tp=2, pp=3), 24) == GridShape(3, 4, 2)
    assert str(grid_shape(ParallelOptions(), 4)) == "pp 1 x dp 4 x tp 1"


def test_sizes_that_do_not_divide_are_refused_with_those_that_would() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tp is 4 and parallel\.pp is 1: 4 ranks hold a model.* 6 ranks of this run") as caught:
        grid_shape(ParallelOptions(tp=4), 6)
    offered = str(caught.value).split("accepted: ")[1].split(", ")
    assert set(offered) == {f"tp {tp} pp {pp}" for tp in range(1, 7) for pp in range(1, 7) if 6 % (tp * pp) == 0}


def groups_of(world: World, shapes: list[GridShape]) -> list[dict[str, tuple[tuple[int, ...], float]]]:
    """Ranks of each of this rank's groups, and the sum of the members' ranks by an all-reduce, of one grid after another."""
    found = []
    for shape in shapes:
        grid = Grid(world, shape, kv_copies=2 if shape.tp % 2 == 0 else 1)
        groups = {"pp": grid.pp, "dp": grid.dp, "tp": grid.tp}
        for degree in (2, 4):
            if (block := grid.block(degree)) is not None:
                groups[f"block{degree}"] = block
        found.append({name: (g.ranks, float(g.all_reduce(torch.tensor([float(world.rank)])))) for name, g in groups.items()})
        found[-1]["made"] = (tuple(sorted(len(group.ranks) for group in grid._divisions.values() if group.handle)), 0.0)
    return found


def test_groups_on_real_ranks(run_ranks: RunRanks) -> None:
    shapes = [GridShape(1, 4, 1), GridShape(2, 1, 2), GridShape(1, 2, 2), GridShape(4, 1, 1), GridShape(2, 2, 1)]
    results = run_ranks(4, groups_of, shapes)
    for number, shape in enumerate(shapes):
        for rank, found in enumerate(result[number] for result in results):
            p, d, t = shape.coordinates(rank)
            expected = {
                "pp": tuple(shape.rank(each, d, t) for each in range(shape.pp)),
                "dp": tuple(shape.rank(p, each, t) for each in range(shape.dp)),
                "tp": tuple(shape.rank(p, d, each) for each in range(shape.tp)),
            }
            for degree in (2, 4):
                first = d // degree * degree
                if first + degree <= shape.dp:
                    expected[f"block{degree}"] = tuple(shape.rank(p, each, t) for each in range(first, first + degree))
            made = found.pop("made")[0]
            assert {name: ranks for name, (ranks, _) in found.items()} == expected
            assert all(total == sum(ranks) for ranks, total in found.values())
            assert len(made) <= 6, "a rank creates the groups that it is in, and no others"


def test_blocks_of_a_number_that_is_no_power_of_two(run_ranks: RunRanks) -> None:
    """Only the full aligned blocks: 0-1 of three; the last rank is in none, and yet no rank waits for another."""
    results = [result[0] for result in run_ranks(3, groups_of, [GridShape(1, 3, 1)])]
    assert [result.get("block2", (None,))[0] for result in results] == [(0, 1), (0, 1), None]
    assert not any("block4" in result for result in results)


def blocks_on(world: World) -> list[tuple[int, ...]]:
    grid = Grid(world, GridShape(1, world.size, 1))
    return [grid.block(1 << power).ranks for power in range(world.size.bit_length())]


def test_there_are_2n_minus_1_blocks_and_each_rank_is_in_log_n_plus_1(run_ranks: RunRanks) -> None:
    results = run_ranks(4, blocks_on)
    assert all(len(blocks) == 3 for blocks in results)
    counts = Counter(block for blocks in results for block in blocks)
    assert len(counts) == 7 and all(count == len(block) for block, count in counts.items())
