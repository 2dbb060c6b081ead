"""Rows written by any owners are read by any other owners."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.atomic_io import write_json
from megatron_ext.checkpoint.optimizer_state import OwnedStateReader, index_of, write_owned
from megatron_ext.errors import CheckpointError
from megatron_ext.optim.ownership import OwnedRows, assign_rows

SHAPES = {"embedding": torch.Size([13, 4]), "norm": torch.Size([7]), "scale": torch.Size([]), "head": torch.Size([3, 5])}


def tensor_of(name: str, kind: str) -> torch.Tensor:
    """The whole tensor of a parameter: distinct numbers."""
    offset = 1000 * list(SHAPES).index(name) + (500 if kind == "exp_avg" else 0)
    return torch.arange(SHAPES[name].numel(), dtype=torch.float32).reshape(SHAPES[name]) + offset


def state_of(rows: OwnedRows) -> dict[str, torch.Tensor]:
    blocks = {kind: tensor_of(rows.name, kind) for kind in ("master", "exp_avg")}
    if SHAPES[rows.name]:
        blocks = {kind: tensor[rows.start : rows.stop] for kind, tensor in blocks.items()}
    return {**blocks, **({"step": torch.tensor(5.0)} if SHAPES[rows.name] else {})}


def write(directory: Path, ranks: int) -> None:
    (directory / "optimizer").mkdir(exist_ok=True)
    entries = []
    for rank in range(ranks):
        owned = [(rows, state_of(rows)) for rows in assign_rows(SHAPES, ranks) if rows.owner == rank]
        file, mine = write_owned(owned, directory, rank, ranks)
        assert (file is None) == (not owned)
        entries += mine
    write_json(directory / "optimizer" / "index.json", index_of(entries))


@given(before=st.integers(1, 6), after=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_any_owners_read_what_any_owners_wrote(tmp_path_factory: pytest.TempPathFactory, before: int, after: int) -> None:
    directory = tmp_path_factory.mktemp("state")
    write(directory, before)
    reader = OwnedStateReader(directory)
    assert reader.rows == {"embedding": 13, "norm": 7, "scale": 1, "head": 3}
    for rows in assign_rows(SHAPES, after):
        values, expected = reader(rows), state_of(rows)
        assert values.keys() == expected.keys()
        assert all(torch.equal(values[kind], tensor) and values[kind].dtype == tensor.dtype for kind, tensor in expected.items())


def test_rows_that_are_not_there_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 2)
    reader = OwnedStateReader(tmp_path)
    for rows in (OwnedRows("embedding", 0, 14, 0), OwnedRows("embedding", 13, 14, 0), OwnedRows("other", 0, 1, 0)):
        with pytest.raises(CheckpointError, match=f"rows {rows.start} to {rows.stop} of {rows.name} are not all there"):
            reader(rows)


@pytest.mark.parametrize(("text", "message"), [("{", "index.json"), ('{"format": 2}', "format is 2; this version reads 1")])
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
        OwnedStateReader(tmp_path)(OwnedRows("norm", 0, 7, 0))
