"""Weights that lie on many ranks come together in files, a tensor at a time, and a full disk on one rank stops no other."""

import errno
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from megatron_ext.checkpoint import weight_files
from megatron_ext.checkpoint.weight_files import plan_weight_files, write_weight_files
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.model.placements import placements
from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.pipeline import stages
from megatron_ext.parallel.tensor import TensorParallel
from megatron_ext.parallel.world import World
from tests.distributed import RunRanks

SHAPES = [GridShape(1, 1, 1), GridShape(1, 2, 2), GridShape(1, 1, 4), GridShape(2, 1, 2), GridShape(3, 1, 1)]
MODEL = ModelConfig(51, 16, 24, 3, 4, 2, 4, 64, tie_embeddings=True)


def part_of(world: World, shape: GridShape) -> tuple[Grid, GPT]:
    grid = Grid(world, shape, kv_copies=max(1, shape.tp // 2))
    layers = {1: [3], 2: [2, 1], 3: [1, 1, 1]}[shape.pp]
    model = GPT(MODEL, tp=TensorParallel(grid.tp), stage=stages(layers)[grid.stage])
    model.reset_parameters(1)
    return grid, model


def export(world: World, shape: GridShape, folder: Path, max_bytes: int) -> tuple[list[str], int]:
    """Names of the files that this rank wrote; most elements of new tensors alive at once while it wrote them."""
    grid, model = part_of(world, shape)
    where = placements(model, grid, True)
    plan = plan_weight_files(where, grid, 4, max_bytes)
    largest: list[int] = []
    original = torch.Tensor.new_empty

    def spy(self: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
        made = original(self, *size, **options)
        largest.append(made.numel())
        return made

    with mock.patch.object(torch.Tensor, "new_empty", spy):
        written = write_weight_files(plan, folder, dict(model.named_parameters()).__getitem__, where, grid)
    return written, max(largest, default=0)


@pytest.mark.parametrize(
    "shape", [GridShape(1, 1, 1), GridShape(1, 2, 2), GridShape(1, 1, 4), GridShape(2, 1, 2), GridShape(3, 1, 1)], ids=str
)
@pytest.mark.parametrize("max_bytes", [2**30, 4000])
def test_every_tensor_is_in_one_file_whole(run_ranks: RunRanks, tmp_path: Path, shape: GridShape, max_bytes: int) -> None:
    results = run_ranks(shape.size, export, shape, tmp_path, max_bytes)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert sorted(name for written, _ in results for name in written) == files
    found = [load_file(tmp_path / name) for name in files]
    expected = GPT(MODEL)
    expected.reset_parameters(1)
    names = [name for tensors in found for name in tensors]
    assert sorted(names) == sorted(name for name, _ in expected.named_parameters()), "each once"
    assert all(torch.equal(value, expected.get_parameter(name)) for tensors in found for name, value in tensors.items())
    assert all(elements <= max(p.numel() for p in expected.parameters()) for _, elements in results), "one tensor at a time"
    if max_bytes == 2**30:
        assert len(files) == shape.pp
    elif shape.dp == 2:
        assert len([written for written, _ in results if written]) == 2, "data ranks take turns"


def fill_disk(world: World, shape: GridShape, folder: Path, victim: int) -> str | None:
    """Export with a full disk on one rank; its error."""
    grid, model = part_of(world, shape)
    where = placements(model, grid, True)
    plan = plan_weight_files(where, grid, 4, 4000)
    original, calls = weight_files.tensor_file, []

    def full(*arguments: Any) -> Any:
        calls.append(arguments)
        if world.rank == victim and len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments)

    with mock.patch.object(weight_files, "tensor_file", full):
        try:
            write_weight_files(plan, folder, dict(model.named_parameters()).__getitem__, where, grid)
        except OSError as error:
            return str(error)
    return None


def test_a_full_disk_on_one_rank_keeps_no_other_waiting(run_ranks: RunRanks, tmp_path: Path) -> None:
    messages = run_ranks(4, fill_disk, GridShape(2, 1, 2), tmp_path, 2)
    assert messages == [None, None, "[Errno 28] No space left on device", None]
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2, "the other files are there"
