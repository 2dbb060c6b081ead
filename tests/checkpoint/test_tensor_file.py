from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_ext.checkpoint import tensor_file as module
from megatron_ext.checkpoint.tensor_file import tensor_file, write_tensors

TENSORS = {
    "matrix": torch.randn(3, 5),
    "bf16": torch.randn(7).bfloat16(),
    "columns": torch.randn(4, 6, dtype=torch.float64)[:, 1:3],
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "ünïcode": torch.ones(1, dtype=torch.float16),
}


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", TENSORS)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in TENSORS.items())
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    kinds = {name: (value.dtype, value.shape) for name, value in TENSORS.items()}
    with pytest.raises(RuntimeError, match="in the middle"), tensor_file(tmp_path / "a.safetensors", kinds) as write:
        write(TENSORS["matrix"])
        raise RuntimeError("in the middle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tensors", [[TENSORS["bf16"]], [TENSORS["matrix"]]], ids=["another", "too few"])
def test_what_was_not_announced_is_a_defect(tmp_path: Path, tensors: list[torch.Tensor]) -> None:
    kinds = {"a": (torch.float32, torch.Size([3, 5])), "b": (torch.float32, torch.Size([1]))}
    with pytest.raises(AssertionError), tensor_file(tmp_path / "a.safetensors", kinds) as write:
        for tensor in tensors:
            write(tensor)
    assert list(tmp_path.iterdir()) == []


def test_every_tensor_is_told_of_and_what_was_written_is_flushed_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {str(number): (torch.float32, torch.Size([64])) for number in range(6)}
    happened: list[str] = []
    monkeypatch.setattr(module, "SYNC_BYTES", 2 * 256)
    monkeypatch.setattr(module.os, "fdatasync", lambda descriptor: happened.append("flushed"))
    with tensor_file(tmp_path / "a.safetensors", kinds, moved=lambda: happened.append("moved")) as write:
        for _ in kinds:
            write(torch.ones(64))
    # The header, which has more bytes than a tensor, comes with the first.
    assert happened == ["flushed", "moved", "moved", "flushed", "moved", "moved", "flushed", "moved", "moved"]
    assert load_file(tmp_path / "a.safetensors").keys() == kinds.keys()
