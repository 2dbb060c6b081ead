"""Files of records, a JSON object a line, that are appended to and outlast a disk that is full for a while."""

import errno
import fcntl
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from megatron_ext.atomic_io import fsync_directory, fsync_file, make_directory
from megatron_ext.errors import StorageError
from megatron_ext.train.console import say

MOST_WAITING = 64 << 20
"""Bytes of the records of a file that may wait in memory."""
RETRY_SECONDS = 1.0
"""Between two tries to write what waits."""
BLOCK_BYTES = 1 << 16
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems say that have no locks."""


class RecordFile:
    """Appends records to a file, each at once and whole. It is made, with its directory, by the first one.

    Records that cannot be written, because the disk is full for example, wait in memory, and later ones try again. That is said once on the
    standard error; ``flush`` raises as long as it is so.

    Args:
        path: of the file. A last line that is cut off, by a writer that was killed, makes room for the next.
        shared: other processes append to it too, also on other hosts.
    """

    def __init__(self, path: Path, shared: bool = False) -> None:
        self._path, self._shared = path, shared
        self._file: IO[bytes] | None = None
        self._waiting: deque[bytes] = deque()
        self._bytes, self._try_at = 0, 0.0
        self._late, self._flushed = False, True
        self._lost: str | None = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record of JSON values; errors as of ``write_line``."""
        self.write_line(json.dumps(record))

    def write_line(self, line: str) -> None:
        """Append a record that is JSON already, without the end of its line.

        Raises:
            StorageError: it could not be written, and more wait than there is memory for.
        """
        self._waiting.append(f"{line}\n".encode())
        self._bytes += len(self._waiting[-1])
        if self._late and time.monotonic() < self._try_at and self._bytes <= MOST_WAITING:
            return
        try:
            self._write_waiting()
        except StorageError as error:
            if self._bytes > MOST_WAITING:
                raise
            if not self._late:
                say(f"{error}. They are tried again", sys.stderr)
            self._late, self._try_at = True, time.monotonic() + RETRY_SECONDS

    def flush(self) -> None:
        """Put on disk what was written.

        Raises:
            StorageError: that cannot be; names the file, the reason and how many records wait.
        """
        self._write_waiting()
        if not self._flushed:
            self._put_on_disk()
        self.close()

    def close(self) -> None:
        """Let go of the file, which another may take the place of; the next record opens it again."""
        if self._file is not None:
            file, self._file = self._file, None
            with storing(self._path):
                file.close()

    def _write_waiting(self) -> None:
        if not self._waiting:
            return
        try:
            with storing(self._path):
                self._append_waiting()
        except StorageError as error:
            raise StorageError(f"{error}; records that wait in memory: {len(self._waiting)}") from error
        if self._late:
            say(f"{self._path} is written again; nothing is missing", sys.stderr)
        self._late = False

    def _append_waiting(self) -> None:
        """Write records in their order as far as there is room. A file of this process alone stays open."""
        try:
            if self._file is None:
                self._file = self._open()
            while self._waiting:
                _append_whole(self._file.fileno(), self._waiting[0])
                self._bytes -= len(self._waiting.popleft())
                self._flushed = False
        except OSError:
            with suppress(StorageError):
                self.close()
            raise
        if self._shared:
            self.close()

    def _open(self) -> IO[bytes]:
        """The file, which ends with a whole line and, where others write too, is locked; closed again if that fails."""
        make_directory(self._path.parent)
        with ExitStack() as failing:
            file = failing.enter_context(open(self._path, "ab+", buffering=0))
            if self._shared:
                _lock(file.fileno())
            _remove_torn_line(file.fileno())
            failing.pop_all()
        return file

    def _put_on_disk(self) -> None:
        """What a flush that failed had to write is lost: the next would succeed without it, so none does."""
        if self._lost is None:
            try:
                fsync_file(self._path)
                fsync_directory(self._path.parent)
            except OSError as error:
                self._lost = error.strerror or str(error)
        if self._lost is not None:
            raise StorageError(
                f"{self._path} could not be put on disk: {self._lost}; records may be lost, and the run must be started again"
            )
        self._flushed = True


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Raises StorageError for an error of the operating system in the block, which writes ``path``."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error


def _lock(descriptor: int) -> None:
    """Keep other writers out as long as the file is open, where the file system can; elsewhere records are appended without it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def _append_whole(descriptor: int, data: bytes) -> None:
    """Append all of ``data`` or nothing."""
    begin, written = os.fstat(descriptor).st_size, 0
    try:
        while written < len(data):
            written += os.write(descriptor, data[written:])
    except OSError:
        # Without a lock another may have written behind it, whose record must stay.
        if written and os.fstat(descriptor).st_size == begin + written:
            os.ftruncate(descriptor, begin)
        raise


def _remove_torn_line(descriptor: int) -> None:
    end = size = os.fstat(descriptor).st_size
    while end > 0:
        begin = max(0, end - BLOCK_BYTES)
        newline = os.pread(descriptor, end - begin, begin).rfind(b"\n")
        if newline >= 0:
            end = begin + newline + 1
            break
        end = begin
    if end < size:
        os.ftruncate(descriptor, end)
