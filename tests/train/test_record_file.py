"""Records that are written whole or wait: on a disk that is really full, and after writers that were killed."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from megatron_ext.errors import StorageError
from megatron_ext.train import record_file
from megatron_ext.train.record_file import RecordFile
from tests.mounts import fill, mounted

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with little room."""
    with mounted(tmp_path / "disk", "size=256k") as folder:
        yield folder


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["number"] for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("shared", [False, True])
def test_what_a_full_disk_does_not_take_waits_and_is_written_in_its_order(
    small_disk: Path, shared: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_file, "RETRY_SECONDS", 0.0)
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
    said = f"{path} cannot be written: No space left on device; records that wait in memory: 1. They are tried again\n"
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


def test_while_the_disk_is_full_not_every_record_tries_it(tmp_path: Path) -> None:
    file, opened = RecordFile(tmp_path / "records.jsonl"), mock.Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with mock.patch("builtins.open", opened):
        for number in range(10):
            file.write({"number": number})
    assert opened.call_count == 1
    file.flush()
    assert numbers(tmp_path / "records.jsonl") == list(range(10))


def test_where_there_are_no_locks_no_record_of_another_is_cut_off(tmp_path: Path) -> None:
    """Another host appends between the moment at which this one looks where the file ends, and its own record."""
    path, fstat = tmp_path / "records.jsonl", os.fstat
    file, other = RecordFile(path, shared=True), b'{"number": 7}\n'
    path.write_bytes(b'{"number": 0}\n')

    def slow(descriptor: int) -> os.stat_result:
        seen = fstat(descriptor)
        with open(path, "ab") as elsewhere:
            elsewhere.write(other)
        return seen

    with mock.patch.object(record_file, "_lock", lambda descriptor: None), mock.patch.object(os, "fstat", slow):
        file.write({"number": 1})
        with mock.patch.object(os, "write", mock.Mock(side_effect=[4, OSError(errno.ENOSPC, "full")])):
            file.write({"number": 2})
    assert path.read_bytes().count(other) == 5 and b'{"number": 1}\n' in path.read_bytes()


def test_a_file_that_could_not_be_locked_is_locked_at_the_next_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_file, "RETRY_SECONDS", 0.0)
    lock = mock.Mock(side_effect=[OSError(errno.EIO, os.strerror(errno.EIO)), None, None])
    file = RecordFile(tmp_path / "records.jsonl", shared=True)
    with mock.patch.object(fcntl, "flock", lock):
        for number in range(3):
            file.write({"number": number})
    assert lock.call_count == 3 and numbers(tmp_path / "records.jsonl") == [0, 1, 2]


def test_what_fitted_is_not_written_again(tmp_path: Path) -> None:
    path, write, room = tmp_path / "records.jsonl", os.write, [2]

    def some(descriptor: int, data: bytes) -> int:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    file = RecordFile(path)
    with mock.patch.object(os, "write", some):
        for number in range(5):
            file.write({"number": number})
        assert numbers(path) == [0, 1]
    file.flush()
    assert numbers(path) == list(range(5))


def test_what_the_disk_lost_is_lost_for_every_later_save(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "records.jsonl")
    file.write({"number": 0})
    broken = mock.Mock(side_effect=OSError(errno.EIO, os.strerror(errno.EIO)))
    with (
        mock.patch.object(os, "fsync", broken),
        pytest.raises(StorageError, match="could not be put on disk: Input/output error"),
    ):
        file.flush()
    with pytest.raises(StorageError, match=r"records\.jsonl could not be put on disk: Input/output error"):
        file.flush()


def test_a_screen_that_is_full_as_well_does_not_end_the_run(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from megatron_ext.train.record_file import RecordFile\n"
        "from megatron_ext.train.console import Console\n"
        "RecordFile(Path(sys.argv[1])).write({'number': 1}); Console(True, 1).say('a line'); os._exit(7)"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=full, stderr=full, check=False)
    assert done.returncode == 7


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
