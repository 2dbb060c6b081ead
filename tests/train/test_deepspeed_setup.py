"""What DeepSpeed is told of the ranks."""

import pytest
import torch.distributed as dist

from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.world import World
from megatron_ext.train.deepspeed_setup import GridForDeepSpeed
from tests.distributed import RunRanks


def groups_made(world: World, shape: GridShape) -> tuple[int, list[int]]:
    """How many groups DeepSpeed's questions make, as many as it asks; and the sizes of those that it is told."""
    ranks, made, new_group = GridForDeepSpeed(Grid(world, shape)), [], dist.new_group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "new_group", lambda *arguments, **options: made.append(1) or new_group(*arguments, **options))
        told = [group for _ in range(50) for group in (ranks.get_data_parallel_group(), ranks.get_model_parallel_group())]
    assert all(group is told[number % 2] for number, group in enumerate(told))
    return len(made), [dist.get_world_size(group) for group in told[:2]]


@pytest.mark.parametrize(("shape", "made", "sizes"), [(GridShape(1, 1, 1), 1, [1, 1]), (GridShape(1, 2, 1), 1, [2, 1])], ids=str)
def test_a_group_is_made_once_however_often_it_is_asked_for(run_ranks: RunRanks, shape: GridShape, made: int, sizes: list[int]) -> None:
    assert run_ranks(shape.size, groups_made, shape) == [(made, sizes)] * shape.size
