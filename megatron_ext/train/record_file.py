"""Files of records, a JSON object a line, that are appended to and outlast a disk that is full for a while."""

import errno
import fcntl
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_ext.atomic_io import fsync_directory, fsync_file, make_directory
from megatron_ext.errors import StorageError

MOST_WAITING = 64 << 20
"""Bytes of the records of a file that may wait in memory."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems say that have no locks."""


class RecordFile:
    """Appends records to a file, each at once and whole. It is made, with its directory, by the first one.

    Records that cannot be written, because the disk is full for example, wait in memory, and every later one tries again. That is said once
    on the standard error; ``flush`` raises as long as it is so.

    Args:
        path: of the file. A last line that is cut off, by a writer that was killed, makes room for the next.
        shared: other processes append to it too, also on other hosts.
    """

    def __init__(self, path: Path, shared: bool = False) -> None:
        self._path, self._shared = path, shared
        self._waiting: list[bytes] = []
        self._late, self._flushed = False, True

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record of JSON values; errors as of ``write_line``."""
        self.write_line(json.dumps(record))

    def write_line(self, line: str) -> None:
        """Append a record that is JSON already, without the end of its line.

        Raises:
            StorageError: it could not be written, and more wait than there is memory for.
        """
        self._waiting.append(f"{line}\n".encode())
        try:
            self._write_waiting()
        except StorageError as error:
            if sum(map(len, self._waiting)) > MOST_WAITING:
                raise
            if not self._late:
                _say(f"{error}. They are tried again with every further one")
            self._late = True

    def flush(self) -> None:
        """Put on disk what was written.

        Raises:
            StorageError: that cannot be; names the file, the reason and how many records wait.
        """
        self._write_waiting()
        if not self._flushed:
            with storing(self._path):
                fsync_file(self._path)
                fsync_directory(self._path.parent)
            self._flushed = True

    def _write_waiting(self) -> None:
        if not self._waiting:
            return
        with storing(self._path, f"; records that wait in memory: {len(self._waiting)}"):
            make_directory(self._path.parent)
            with open(self._path, "ab+", buffering=0) as file:
                if self._shared:
                    _lock(file.fileno())
                _append_whole(file.fileno(), b"".join(self._waiting))
        self._waiting.clear()
        self._flushed = False
        if self._late:
            _say(f"{self._path} is written again; nothing is missing")
        self._late = False


@contextmanager
def storing(path: Path, more: str = "") -> Iterator[None]:
    """Raises StorageError for an error of the operating system in the block, which writes ``path``; it ends with ``more``."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}{more}") from error


def _lock(descriptor: int) -> None:
    """Keep other writers out as long as the file is open, where the file system can; elsewhere records are appended without it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def _append_whole(descriptor: int, data: bytes) -> None:
    """Append all of ``data`` behind the last whole line, or nothing."""
    end = _end_of_lines(descriptor)
    os.ftruncate(descriptor, end)
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except OSError:
        os.ftruncate(descriptor, end)
        raise


def _end_of_lines(descriptor: int) -> int:
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return size
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        return file.read().rfind(b"\n") + 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
