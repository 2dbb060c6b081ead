"""Master weights and moments on disk, indexed by (name, box) and never by rank.

``optimizer/owned-*.safetensors`` hold tensors named ``<parameter>|<kind>|<start>:<stop>,...``, a range for each dimension of the whole
parameter, or for its first ones (a number for each row); ``optimizer/index.json`` says which file has which boxes. Any rank of any later
run, on any grid, reads just the boxes that it owns then.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_ext.checkpoint.finite import require_finite
from megatron_ext.checkpoint.optimizer_index import checked_parameters
from megatron_ext.checkpoint.tensor_file import host_copy, tensor_file
from megatron_ext.errors import CheckpointError
from megatron_ext.json_text import parse_json
from megatron_ext.optim.ownership import OwnedBox
from megatron_ext.parallel.placement import Box, box_shape, intersection, slices

FOLDER = "optimizer"
INDEX = "index.json"
FORMAT = 3
MASTER = "master"
OwnedState = tuple[OwnedBox, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class OwnedFile:
    """The parts that one rank saves, and their file."""

    name: str
    """Relative to the checkpoint."""
    entries: list[dict[str, Any]]
    """Of the parts, for the index."""
    tensors: dict[str, torch.Tensor]
    """By the name that they have in the file."""

    @property
    def num_bytes(self) -> int:
        """Size of the values."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.tensors.values())

    def copied(self) -> "OwnedFile":
        """With the values as they are now, in memory of the host that nobody else writes to."""
        return replace(self, tensors={key: host_copy(tensor) for key, tensor in self.tensors.items()})

    def write(self, directory: Path, moved: Callable[[], None] = lambda: None) -> list[str]:
        """Write the file into a checkpoint; returns its name, or nothing where the rank saves nothing.

        Args:
            directory: of the checkpoint.
            moved: called after each tensor.

        Raises:
            NonFiniteError: a master or a moment is not finite.
        """
        if not self.entries:
            return []
        kinds = {key: (tensor.dtype, tensor.shape) for key, tensor in self.tensors.items()}
        with tensor_file(directory / self.name, kinds, moved=moved) as write:
            for key, tensor in self.tensors.items():
                name, kind, _ = key.split("|")
                write(require_finite(name, kind, tensor))
        return [self.name]


def owned_file(state: Iterable[OwnedState], rank: int, size: int) -> OwnedFile:
    """What one rank saves.

    Args:
        state: parts with their tensors by kind: of the shape of the part (``master`` and moments) or of its first dimensions (a number
            for each row), or scalars (``step``).
        rank: number of this file among ``size``.
    """
    entries = []
    name = f"{FOLDER}/owned-{rank + 1:05d}-of-{size:05d}.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    for part, values in state:
        blocks = {kind: t for kind, t in values.items() if t.ndim or t.shape == values[MASTER].shape}
        scalars = {kind: t.item() for kind, t in values.items() if kind not in blocks}
        tensors |= {_key(part.name, kind, part.box[: tensor.ndim]): tensor for kind, tensor in blocks.items()}
        box, dimensions = [list(bounds) for bounds in part.box], {kind: blocks[kind].ndim for kind in sorted(blocks)}
        entries.append({"name": part.name, "box": box, "file": name, "kinds": dimensions, "scalars": scalars})
    return OwnedFile(name, entries, tensors)


def index_of(entries: Iterable[dict[str, Any]], shapes: dict[str, list[int]]) -> dict[str, Any]:
    """Contents of ``optimizer/index.json``.

    Args:
        entries: of all ranks.
        shapes: of the whole parameters, by name.
    """
    parameters: dict[str, dict[str, Any]] = {name: {"shape": shape, "parts": []} for name, shape in shapes.items()}
    for entry in entries:
        parameters[entry["name"]]["parts"].append({key: value for key, value in entry.items() if key != "name"})
    return {"format": FORMAT, "parameters": parameters}


class OwnedStateReader:
    """Reads any box of any parameter from a checkpoint's ``optimizer/`` folder, and no more than that.

    Raises:
        CheckpointError: on construction and on reading, if the index or a file is unusable or values are missing.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        path = directory / FOLDER / INDEX
        try:
            index = parse_json(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        self._parameters = checked_parameters(index, FORMAT, directory, path)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each whole parameter of the checkpoint, by name."""
        return {name: torch.Size(parameter["shape"]) for name, parameter in self._parameters.items()}

    def __call__(self, wanted: OwnedBox) -> dict[str, torch.Tensor]:
        """Tensors of this box by kind, and scalars as tensors without dimensions."""
        found = []
        for part in self._parameters.get(wanted.name, {"parts": []})["parts"]:
            box = tuple((start, stop) for start, stop in part["box"])
            if (shared := intersection(box, wanted.box)) is not None:
                found.append((part, box, shared))
        if sum(_volume(shared) for _, _, shared in found) != _volume(wanted.box):
            ranges = _ranges(wanted.box) or "all"
            raise CheckpointError(f"{self._directory / FOLDER}: {wanted.name}[{ranges}] is not there, each value exactly once")
        first = found[0][0]
        if any(part["kinds"] != first["kinds"] for part, _, _ in found):
            raise CheckpointError(f"{self._directory / FOLDER}: {wanted.name}: its parts do not have the same kinds of values")
        values = {kind: self._assemble(wanted, kind, dimensions, found) for kind, dimensions in first["kinds"].items()}
        return values | {kind: torch.tensor(value) for kind, value in first["scalars"].items()}

    def _assemble(self, wanted: OwnedBox, kind: str, dimensions: int, found: list[tuple[dict[str, Any], Box, Box]]) -> torch.Tensor:
        whole: torch.Tensor | None = None
        place = wanted.box[:dimensions]
        for part, box, shared in ((part, box[:dimensions], shared[:dimensions]) for part, box, shared in found):
            values = self._read(part, wanted.name, kind, box, shared)
            if len(found) == 1:
                return values
            whole = torch.empty(box_shape(place), dtype=values.dtype) if whole is None else whole
            whole[slices(shared, place)] = values
        assert whole is not None, "found parts cover the wanted box"
        return whole

    def _read(self, part: dict[str, Any], name: str, kind: str, box: Box, shared: Box) -> torch.Tensor:
        path = self._directory / part["file"]
        try:
            with safe_open(path, framework="pt") as file:
                saved = file.get_slice(_key(name, kind, box))
                if saved.get_shape() != list(box_shape(box)):
                    raise CheckpointError(f"{path}: {name} ({kind}) has shape {saved.get_shape()}; accepted: {list(box_shape(box))}")
                return saved[slices(shared, box)] if box else saved[...]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {name} ({kind}): {error}") from error


def _volume(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def _ranges(box: Box) -> str:
    return ",".join(f"{start}:{stop}" for start, stop in box)


def _key(name: str, kind: str, box: Box) -> str:
    return f"{name}|{kind}|{_ranges(box)}"
