"""The exported weights of a model that many ranks hold: which file has which tensors, who writes it, and how its tensors come together."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.checkpoint.finite import require_finite
from megatron_ext.checkpoint.hf import shard_file_names, shard_plan
from megatron_ext.checkpoint.tensor_file import host_copy, tensor_file
from megatron_ext.errors import NonFiniteError
from megatron_ext.parallel.grid import Grid
from megatron_ext.parallel.placement import Placement, box_shape, slices, whole_box


@dataclass(frozen=True)
class WeightFile:
    """A file of tensors of one pipeline stage, in the order of the model."""

    name: str
    stage: int
    writer: int
    """The data rank that writes it."""
    shapes: dict[str, torch.Size]

    def is_written_by(self, grid: Grid) -> bool:
        """True on the one rank that writes it."""
        return self.stage == grid.stage and self.writer == grid.dp.rank and grid.tp.rank == 0


def plan_weight_files(placements: Mapping[str, Placement], grid: Grid, itemsize: int, max_bytes: int) -> list[WeightFile]:
    """Divide the model into files; all ranks call it and get the same.

    Args:
        placements: of this rank's parameters.
        grid: the ranks; the data ranks of a stage take turns at its files.
        itemsize: bytes of a value.
        max_bytes: largest file; a larger tensor gets one of its own.
    """
    speaks = grid.dp.rank == 0 and grid.tp.rank == 0
    told = grid.world.gather([[name, list(p.shape)] for name, p in placements.items()] if speaks else [])
    plan: list[tuple[int, int, dict[str, torch.Size]]] = []
    seen: set[str] = set()
    for stage in range(grid.shape.pp):
        # A tied embedding is on the last stage, too: the first writes it.
        shapes = {name: torch.Size(shape) for name, shape in told[grid.shape.rank(stage, 0, 0)] if name not in seen}
        seen |= shapes.keys()
        groups = shard_plan({name: shape.numel() * itemsize for name, shape in shapes.items()}, max_bytes)
        plan += [(stage, turn % grid.shape.dp, {name: shapes[name] for name in names}) for turn, names in enumerate(groups)]
    return [WeightFile(file, *rest) for file, rest in zip(shard_file_names(len(plan)), plan, strict=True)]


def write_weight_files(
    files: list[WeightFile], directory: Path, weight: Callable[[str], Tensor], placements: Mapping[str, Placement], grid: Grid
) -> list[str]:
    """Write the files that are this rank's to write, and send the others what they need of this rank's. A tensor at a time.

    Args:
        files: the plan.
        directory: of the checkpoint.
        weight: this rank's part of a parameter; all ranks of a stage ask for the same ones in the same order.
        placements: of this rank's parameters.
        grid: the ranks.

    Returns:
        Names of the files that this rank wrote.

    Raises:
        OSError, NonFiniteError: after all files have been gone through, so that no rank waits for this one.
    """
    written, failure = [], None
    for file in (file for file in files if file.stage == grid.stage):
        tensors = _assembled(file, weight, placements, grid)
        if file.is_written_by(grid):
            try:
                _write(directory / file.name, file.shapes, tensors, grid.world.activity.move)
                written.append(file.name)
            except (OSError, NonFiniteError) as error:
                failure = failure or error
        for _ in tensors:
            pass
    if failure is not None:
        raise failure
    return written


def copy_weight_files(
    files: list[WeightFile], weight: Callable[[str], Tensor], placements: Mapping[str, Placement], grid: Grid
) -> list[tuple[WeightFile, list[Tensor]]]:
    """As ``write_weight_files``, but keep copies in the memory of the host of what this rank is to write."""
    kept = []
    for file in (file for file in files if file.stage == grid.stage):
        tensors = _assembled(file, weight, placements, grid)
        if file.is_written_by(grid):
            kept.append((file, [host_copy(tensor) for tensor in tensors]))
        for _ in tensors:
            pass
    return kept


def write_copies(copies: list[tuple[WeightFile, list[Tensor]]], directory: Path, moved: Callable[[], None] = lambda: None) -> list[str]:
    """Write what ``copy_weight_files`` kept; returns the names of the files. ``moved`` is called after each tensor."""
    for file, tensors in copies:
        _write(directory / file.name, file.shapes, iter(tensors), moved)
    return [file.name for file, _ in copies]


def _write(path: Path, shapes: Mapping[str, torch.Size], tensors: Iterator[Tensor], moved: Callable[[], None]) -> None:
    tensors = (require_finite(name, "exported", tensor) for name, tensor in zip(shapes, tensors, strict=True))
    first = next(tensors)
    with tensor_file(path, {name: (first.dtype, shape) for name, shape in shapes.items()}, {"format": "pt"}, moved) as write:
        write(first)
        del first
        for tensor in tensors:
            write(tensor)


def _assembled(file: WeightFile, weight: Callable[[str], Tensor], placements: Mapping[str, Placement], grid: Grid) -> Iterator[Tensor]:
    """The whole tensors of a file, on its writer; on other ranks something, once it has been sent."""
    for name in file.shapes:
        part, placement = weight(name), placements[name]
        if file.writer == grid.dp.rank and placement.box != whole_box(placement.shape):
            yield _collect(part, placement, grid) if grid.tp.rank == 0 else _contribute(part, placement, grid)
        else:
            yield part


def _contribute(part: Tensor, placement: Placement, grid: Grid) -> Tensor:
    """Send this rank's box, and its values unless another rank before it holds the same."""
    is_first = placement.replicas[0] == grid.world.rank
    header = [int(is_first), *(bound for bounds in placement.box for bound in bounds)]
    grid.tp.send(torch.tensor(header, device=part.device), to=0)
    if is_first:
        grid.tp.send(part, to=0)
    return part


def _collect(part: Tensor, placement: Placement, grid: Grid) -> Tensor:
    """The whole tensor, from this rank's part and those of the other tensor-parallel ranks."""
    origin = whole_box(placement.shape)
    whole = part.new_empty(placement.shape)
    whole[slices(placement.box, origin)] = part
    for rank in range(1, grid.tp.size):
        header = torch.empty(1 + 2 * len(origin), dtype=torch.int64, device=part.device)
        is_first, *bounds = grid.tp.receive(header, rank).tolist()
        box = tuple(zip(bounds[::2], bounds[1::2], strict=True))
        if is_first:
            whole[slices(box, origin)] = grid.tp.receive(part.new_empty(box_shape(box)), rank)
    return whole
