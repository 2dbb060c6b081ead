"""Rows written by any owners are read by any other owners."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.atomic_io import write_json
from megatron_ext.checkpoint.optimizer_state import OwnedStateReader, index_of, owned_file
from megatron_ext.errors import CheckpointError
from megatron_ext.optim.ownership import OwnedBox, assign_rows
from megatron_ext.parallel.placement import slices, whole_box

SHAPES = {"embedding": torch.Size([13, 4]), "norm": torch.Size([7]), "scale": torch.Size([]), "head": torch.Size([3, 5])}


def tensor_of(name: str, kind: str) -> torch.Tensor:
    """The whole tensor of a parameter: distinct numbers."""
    offset = 1000 * list(SHAPES).index(name) + (500 if kind == "exp_avg" else 0)
    return torch.arange(SHAPES[name].numel(), dtype=torch.float32).reshape(SHAPES[name]) + offset


def state_of(part: OwnedBox) -> dict[str, torch.Tensor]:
    index = slices(part.box, whole_box(SHAPES[part.name]))
    blocks = {kind: tensor_of(part.name, kind)[index] for kind in ("master", "exp_avg")}
    return {**blocks, **({"step": torch.tensor(5.0)} if SHAPES[part.name] else {})}


def parts_of(ranks: int, columns: int) -> list[OwnedBox]:
    """Parts of all parameters: the matrices first divided by columns, as under tensor parallelism, then each part by rows over ranks."""
    parts: list[OwnedBox] = []
    for part in range(columns):
        boxes = {name: whole_box(shape) for name, shape in SHAPES.items() if len(shape) == 2 or part == 0}
        divided = {
            name: box if len(box) < 2 else (box[0], (box[1][1] * part // columns, box[1][1] * (part + 1) // columns))
            for name, box in boxes.items()
        }
        parts += assign_rows(divided, ranks)
    return parts


def write(directory: Path, ranks: int, columns: int = 1) -> None:
    (directory / "optimizer").mkdir(exist_ok=True)
    entries = []
    for rank in range(ranks):
        owned = [(part, state_of(part)) for part in parts_of(ranks, columns) if part.owner == rank]
        file = owned_file(owned, rank, ranks)
        assert len(file.write(directory)) == bool(owned)
        entries += file.entries
    write_json(directory / "optimizer" / "index.json", index_of(entries, {name: list(shape) for name, shape in SHAPES.items()}))


GRID = st.tuples(st.integers(1, 6), st.integers(1, 3))


@given(before=GRID, after=GRID)
@settings(max_examples=40, deadline=None)
def test_any_owners_read_what_any_owners_wrote(
    tmp_path_factory: pytest.TempPathFactory, before: tuple[int, int], after: tuple[int, int]
) -> None:
    directory = tmp_path_factory.mktemp("state")
    write(directory, *before)
    reader = OwnedStateReader(directory)
    assert reader.shapes == SHAPES
    for part in parts_of(*after):
        values, expected = reader(part), state_of(part)
        assert values.keys() == expected.keys()
        assert all(torch.equal(values[kind], tensor) and values[kind].dtype == tensor.dtype for kind, tensor in expected.items())


@pytest.mark.parametrize(
    "part",
    [
        OwnedBox("embedding", ((0, 14), (0, 4)), 0),
        OwnedBox("embedding", ((13, 14), (0, 4)), 0),
        OwnedBox("head", ((0, 3), (4, 6)), 0),
        OwnedBox("other", ((0, 1),), 0),
    ],
)
def test_values_that_are_not_there_are_refused(tmp_path: Path, part: OwnedBox) -> None:
    write(tmp_path, 2)
    with pytest.raises(CheckpointError, match=rf"{part.name}\[.*\] is not there, each value exactly once"):
        OwnedStateReader(tmp_path)(part)


def test_values_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    path = tmp_path / "optimizer" / "index.json"
    index = json.loads(path.read_text("utf-8"))
    index["parameters"]["head"]["parts"] *= 2
    write_json(path, index)
    with pytest.raises(CheckpointError, match=r"head\[0:3,0:5\] is not there, each value exactly once"):
        OwnedStateReader(tmp_path)(OwnedBox("head", ((0, 3), (0, 5)), 0))


def test_no_more_is_read_than_was_asked_for(tmp_path: Path) -> None:
    write(tmp_path, 1)
    read: list[torch.Size] = []

    class Spy(OwnedStateReader):
        def _read(self, *arguments: Any) -> torch.Tensor:
            values = super()._read(*arguments)
            read.append(values.shape)
            return values

    Spy(tmp_path)(OwnedBox("embedding", ((5, 7), (1, 3)), 0))
    assert read == [torch.Size([2, 2])] * 2, "master and moment"


@pytest.mark.parametrize(("text", "message"), [("{", "index.json"), ('{"format": 1}', "format is 1; this version reads 3")])
def test_an_index_that_cannot_be_used_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "index.json").write_text(text, "utf-8")
    with pytest.raises(CheckpointError, match=message):
        OwnedStateReader(tmp_path)


def test_a_file_that_lacks_its_rows_is_named(tmp_path: Path) -> None:
    write(tmp_path, 1)
    index = tmp_path / "optimizer" / "index.json"
    index.write_text(index.read_text("utf-8").replace('"exp_avg"', '"momentum"'), "utf-8")
    with pytest.raises(CheckpointError, match=r"owned-00001-of-00001\.safetensors: norm \(momentum\)"):
        OwnedStateReader(tmp_path)(OwnedBox("norm", ((0, 7),), 0))
