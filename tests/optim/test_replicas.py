import pytest
import torch

from megatron_ext.errors import ReplicaError
from megatron_ext.optim.replicas import check_replicas, digest
from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.placement import Placement, whole_box
from megatron_ext.parallel.world import World
from tests.distributed import RunRanks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_digest_notices_a_changed_bit_and_an_exchange(dtype: torch.dtype) -> None:
    values = torch.arange(1.0, 40.0).to(dtype)
    changed, exchanged = values.clone(), values.clone()
    changed.view(torch.uint8)[17] ^= 1
    exchanged[[3, 8]] = exchanged[[8, 3]]
    assert torch.equal(digest(values), digest(values.clone()))
    assert not torch.equal(digest(values), digest(changed)) and not torch.equal(digest(values), digest(exchanged))


def compare(world: World, shape: GridShape, wrong_rank: int | None, name: str) -> str | None:
    """The error that this rank sees when a bit of a parameter of ``wrong_rank`` is flipped. The norm is alike on tensor-parallel ranks."""
    grid = Grid(world, shape)
    stage_rank = grid.tp.rank
    parameters = {"matrix": torch.full((4, 3), float(stage_rank)), "norm": torch.ones(5)}
    placements = {
        "matrix": Placement(torch.Size([4 * shape.tp, 3]), ((4 * stage_rank, 4 * stage_rank + 4), (0, 3)), (world.rank,), False),
        "norm": Placement(torch.Size([5]), whole_box(torch.Size([5])), grid.tp.ranks, False),
    }
    if world.rank == wrong_rank:
        parameters[name].view(torch.int32).view(-1)[2] ^= 1
    try:
        check_replicas(parameters, placements, grid)
    except ReplicaError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("shape", "wrong_rank", "name", "blamed"),
    [
        (GridShape(1, 4, 1), 2, "matrix", "ranks [0, 1, 3] from ranks [2]"),
        (GridShape(1, 2, 2), 1, "matrix", "ranks [1] from ranks [3]"),
        (GridShape(1, 1, 4), 3, "norm", "ranks [0, 1, 2] from ranks [3]"),
        (GridShape(1, 2, 2), None, "norm", None),
    ],
    ids=str,
)
def test_a_flipped_bit_is_named_on_all_ranks(
    run_ranks: RunRanks, shape: GridShape, wrong_rank: int | None, name: str, blamed: str | None
) -> None:
    for message in run_ranks(4, compare, shape, wrong_rank, name):
        if blamed is None:
            assert message is None
        else:
            assert message is not None and message.startswith(f"{name} differs") and blamed in message
