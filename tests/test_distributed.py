"""The rank pools themselves: results by rank, real collectives, and a failing rank's own traceback."""

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
