"""Parts of matrices meet on one rank each, whole, and new values go back to every holder."""

import torch

from megatron_ext.optim.matrix_exchange import MatrixExchange
from megatron_ext.optim.ownership import OwnedBox
from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.placement import Box, slices, whole_box
from megatron_ext.parallel.world import World
from tests.distributed import RunRanks

SHAPES = {"rows": (7, 3), "columns": (2, 9), "alike": (4, 4), "copies": (6, 2), "single": (1, 5)}
MEETS_ON = {"rows": 2, "columns": 0, "alike": 2, "copies": 1, "single": 0}
BOXES: dict[str, list[Box]] = {
    "rows": [((0, 3), (0, 3)), ((3, 5), (0, 3)), ((5, 7), (0, 3))],
    "columns": [((0, 2), (0, 3)), ((0, 2), (3, 6)), ((0, 2), (6, 9))],
    "alike": [((0, 4), (0, 4))] * 3,
    "copies": [((0, 3), (0, 2)), ((0, 3), (0, 2)), ((3, 6), (0, 2))],
    "single": [((0, 1), (0, 2)), ((0, 1), (2, 4)), ((0, 1), (4, 5))],
}


def whole(name: str, factor: int = 1) -> torch.Tensor:
    return torch.arange(torch.Size(SHAPES[name]).numel(), dtype=torch.float64).reshape(SHAPES[name]) * factor + 1


def part(name: str, rank: int, values: torch.Tensor) -> torch.Tensor:
    return values[slices(BOXES[name][rank], whole_box(values.shape))]


def exchanged(world: World) -> dict[str, object]:
    group = Grid(world, GridShape(1, 1, 3)).tp
    parts = [OwnedBox(name, BOXES[name][world.rank], 0, MEETS_ON[name]) for name in SHAPES]
    exchange = MatrixExchange(parts, {name: torch.Size(shape) for name, shape in SHAPES.items()}, group, world.device)
    sent = [part(name, world.rank, whole(name)) for name in SHAPES]
    # Of equal parts the first counts: what the others say of theirs must not matter.
    if world.rank == 1:
        sent = [torch.full_like(x, -1.0) if name in ("alike", "copies") else x for name, x in zip(SHAPES, sent, strict=True)]
    wholes = exchange.gather(sent)
    back = exchange.scatter([matrix * 3 for matrix in wholes], sent[0].float())
    traffic = {key[1]: value for key, value in group.traffic.sent.items()}
    return {"here": [(owned.name, owned.box) for owned in exchange.met_here], "wholes": wholes, "back": back, "sent": traffic["all_to_all"]}


def test_matrices_meet_and_go_back(run_ranks: RunRanks) -> None:
    results = run_ranks(3, exchanged)
    for rank, result in enumerate(results):
        mine = [name for name in SHAPES if MEETS_ON[name] == rank]
        assert result["here"] == [(name, whole_box(torch.Size(SHAPES[name]))) for name in mine]
        for name, matrix in zip(mine, result["wholes"], strict=True):
            assert torch.equal(matrix, whole(name)), name
        for name, values in zip(SHAPES, result["back"], strict=True):
            assert values.dtype == torch.float32
            assert torch.equal(values, part(name, rank, whole(name) * 3).float()), name


def test_no_more_is_sent_than_is_needed(run_ranks: RunRanks) -> None:
    """8 bytes a value on the way there, 4 on the way back, and nothing to oneself."""
    for rank, result in enumerate(run_ranks(3, exchanged)):
        sizes = {name: [torch.Size(stop - start for start, stop in box).numel() for box in BOXES[name]] for name in SHAPES}
        first = {name: BOXES[name].index(BOXES[name][rank]) == rank for name in SHAPES}
        there = sum(8 * sizes[name][rank] for name in SHAPES if first[name] and MEETS_ON[name] != rank)
        back = sum(4 * sizes[name][other] for name in SHAPES for other in range(3) if MEETS_ON[name] == rank and other != rank)
        assert result["sent"] == there + back
