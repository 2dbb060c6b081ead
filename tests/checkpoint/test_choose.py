"""The newest whole checkpoint, whatever happened to those after it."""

import errno
import os
from pathlib import Path
from typing import IO, Any
from unittest import mock

import pytest

from megatron_ext.checkpoint import manifest
from megatron_ext.checkpoint.choose import Choice, newest_whole
from megatron_ext.checkpoint.directory import saved_steps
from megatron_ext.checkpoint.load import find_checkpoint, verify
from megatron_ext.errors import CheckpointError
from tests.checkpoint.tiny_state import trained, weight_of, writer
from tests.distributed import RunRanks
from tests.grids import ALONE
from tests.train.tiny_run import train, write_run


def test_damaged_checkpoints_are_passed_over_with_their_reasons(run_ranks: RunRanks, tmp_path: Path) -> None:
    run_ranks(1, train, write_run(tmp_path, train__steps=4, checkpoint__every=1, checkpoint__keep_last=3))
    root = tmp_path / "run" / "checkpoints"
    second, third, last = (root / f"step_{step:08d}" for step in (2, 3, 4))
    assert newest_whole(root) == Choice(last) and newest_whole(root).step == 4

    weights = last / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    choice = newest_whole(root)
    assert choice.path == third and len(choice.passed_over) == 1 and f"{weights} is altered" in choice.passed_over[0]

    os.truncate(third / "trainer_state.json", 100)
    choice = newest_whole(root)
    assert choice.path == second and [str(third) in reason for reason in choice.passed_over] == [False, True]

    (root / "latest").write_text("nonsense\n")
    choice = newest_whole(root)
    assert choice.path == second and "latest says 'nonsense'" in choice.passed_over[0]

    (second / "config.json").unlink()
    choice = newest_whole(root)
    assert choice.path is None and choice.step == 0 and len(choice.passed_over) == 4


def test_checkpoints_after_the_one_that_latest_names_are_of_another_attempt(run_ranks: RunRanks, tmp_path: Path) -> None:
    run_ranks(1, train, write_run(tmp_path, train__steps=2, checkpoint__every=1))
    root = tmp_path / "run" / "checkpoints"
    (root / "latest").write_text("step_00000001\n")
    assert newest_whole(root) == Choice(root / "step_00000001")


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE], ids=errno.errorcode.get)
def test_a_checkpoint_that_cannot_be_read_is_passed_over(tmp_path: Path, number: int) -> None:
    model, optimizer = trained()
    for step in (1, 2):
        writer(tmp_path).save(step, weight_of(model), optimizer, {})
    first, second = (tmp_path / f"step_{step:08d}" for step in (1, 2))
    bad, is_dir = second / "model.safetensors", Path.is_dir

    def unreadable(path: Path, *arguments: Any, **options: Any) -> IO[bytes]:
        if path == bad:
            raise OSError(number, os.strerror(number))
        return open(path, *arguments, **options)

    with mock.patch.object(manifest, "open", unreadable, create=True):
        choice = newest_whole(tmp_path)
        assert choice.path == first and choice.passed_over == (f"{bad} cannot be read: {os.strerror(number)}",)
        with pytest.raises(CheckpointError, match=f"{bad} cannot be read: .*. The next older whole checkpoint is {first}"):
            verify(second, ALONE)

    def gone(self: Path) -> bool:
        if self == second:
            raise OSError(number, os.strerror(number))
        return is_dir(self)

    with mock.patch.object(Path, "is_dir", gone):
        assert [path.name for path in saved_steps(tmp_path)] == [first.name, second.name], "it is there, whatever is wrong with it"
        with pytest.raises(CheckpointError, match=f"{second} cannot be read: .*. The next older whole checkpoint is {first}"):
            find_checkpoint(tmp_path, "auto")


def test_nothing_saved_is_nothing_passed_over(tmp_path: Path) -> None:
    assert newest_whole(tmp_path / "none") == Choice(None)
