"""Records that are written whole or wait: on a disk that is really full, and after writers that were killed."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from megatron_ext.errors import StorageError
from megatron_ext.train import record_file
from megatron_ext.train.record_file import RecordFile
from tests.mounts import fill, mounted


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with little room."""
    with mounted(tmp_path / "disk", "size=256k") as folder:
        yield folder


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["number"] for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("shared", [False, True])
def test_what_a_full_disk_does_not_take_waits_and_is_written_in_its_order(
    small_disk: Path, shared: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    path = small_disk / "records.jsonl"
    file = RecordFile(path, shared)
    file.write({"number": 0})
    ballast = fill(small_disk)
    written = 1
    while numbers(path) == list(range(written)):
        file.write({"number": written, "filler": "x" * 1000})
        written += 1
        assert written < 100, "the disk is never full"
    assert path.read_bytes().endswith(b"}\n"), "a part of a record is not left behind"
    reached = len(numbers(path))
    file.write({"number": written})
    said = (
        f"{path} cannot be written: No space left on device; records that wait in memory: 1. They are tried again with every further one\n"
    )
    assert capsys.readouterr().err == said, "once"
    with pytest.raises(StorageError, match=f"{path} cannot be written: No space left on device; records that wait in memory: 2"):
        file.flush()
    ballast.unlink()
    file.write({"number": written + 1})
    assert numbers(path) == list(range(written + 2)) and reached == written - 1
    assert capsys.readouterr().err == f"{path} is written again; nothing is missing\n"
    file.flush()


def test_a_directory_that_is_missing_is_made_and_one_that_cannot_be_is_waited_for(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "a" / "b" / "records.jsonl")
    (tmp_path / "a").write_text("in the way", "utf-8")
    file.write({"number": 1})
    (tmp_path / "a").unlink()
    file.flush()
    assert numbers(tmp_path / "a" / "b" / "records.jsonl") == [1]


def test_memory_is_bounded(tmp_path: Path) -> None:
    file = RecordFile(tmp_path)
    with mock.patch.object(record_file, "MOST_WAITING", 110):
        for number in range(4):
            file.write({"number": number, "x": "abcd"})
        with pytest.raises(StorageError, match="cannot be written: Is a directory; records that wait in memory: 5"):
            file.write({"number": 4})


@pytest.mark.parametrize("torn", [b'{"number": 7', b'{"number": 0}\n{"numb', b'{"number": 0}\n\xff'])
def test_a_line_that_was_cut_off_makes_room_for_the_next(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(torn)
    RecordFile(path).write({"number": 1})
    assert numbers(path) == ([0, 1] if b"\n" in torn else [1])


def test_what_is_flushed_is_flushed_with_its_name_and_once(tmp_path: Path) -> None:
    path, flushed, fsync = tmp_path / "ledger" / "records.jsonl", [], os.fsync

    def noted(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    file = RecordFile(path)
    with mock.patch.object(os, "fsync", noted):
        file.flush()
        assert flushed == []
        file.write({"number": 1})
        file.flush()
        file.flush()
    assert flushed == [tmp_path, path, tmp_path / "ledger"]
