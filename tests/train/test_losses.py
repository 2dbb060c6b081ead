import torch

from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.world import World
from megatron_ext.train.losses import LossSums
from tests.distributed import RunRanks


def sums_on(world: World, shape: GridShape) -> tuple[list[float], list[float], list[float]]:
    """Every rank adds the same pack and its rank beside."""
    losses = LossSums(3)
    losses.add(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0, 0, 2]))
    sums, beside = losses.over(Grid(world, shape), torch.tensor([float(world.rank)], dtype=torch.float64))
    return sums[0].tolist(), sums[1].tolist(), beside.tolist()


def test_packs_count_once_whatever_ranks_share_them(run_ranks: RunRanks) -> None:
    for shape, packs in ((GridShape(1, 4, 1), 4), (GridShape(1, 1, 4), 1), (GridShape(4, 1, 1), 1), (GridShape(2, 1, 2), 1)):
        for sums, counts, beside in run_ranks(4, sums_on, shape):
            assert sums == [packs * 1.0, 0.0, packs * 2.0]
            assert counts == [packs * 1.0, 0.0, packs * 0.5]
            assert beside == [6.0]
