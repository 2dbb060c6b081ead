"""The rank pools themselves: results by rank, real collectives, and a failing rank's own traceback."""

import os

import pytest
import torch
import torch.distributed as dist

from megatron_ext.parallel.world import World
from tests.distributed import RankError, RankPools


def _sum_of_ranks(world: World, offset: int) -> int:
    value = torch.tensor([world.rank + offset])
    dist.all_reduce(value)
    return int(value)


def _fail_on_last(world: World) -> None:
    if world.rank == world.size - 1:
        raise ValueError("the last rank gives up")
    world.barrier()


def _pid_after_groups(world: World, count: int) -> int:
    for _ in range(count):
        dist.new_group([0, 1])
    return os.getpid()


def test_a_pool_with_many_groups_is_replaced() -> None:
    pools = RankPools(threads_per_rank=40)
    try:
        first, same, other = (pools(2, _pid_after_groups, count)[0] for count in (0, 20, 0))
        assert first == same != other
    finally:
        pools.close()


def test_results_come_from_real_collectives(run_ranks: RankPools) -> None:
    assert run_ranks(2, _sum_of_ranks, 10) == [21, 21]


def test_a_failing_rank_shows_its_traceback_and_the_pool_is_replaced() -> None:
    pools = RankPools()
    try:
        with pytest.raises(RankError, match="rank 1 failed(.|\n)*the last rank gives up"):
            pools(2, _fail_on_last)
        assert pools(2, _sum_of_ranks, 0) == [1, 1]
    finally:
        pools.close()
