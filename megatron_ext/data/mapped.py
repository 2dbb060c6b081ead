"""Files in memory as they lie on disk, and arrays in them. Nothing is allocated by a size that a file only claims."""

import io
import mmap
import os
import tokenize
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_ext.errors import DataError


class MappedFile:
    """A file's contents, read-only and memory-mapped.

    Args:
        path: of a regular file.
        accepted: what the file should be, for messages.

    Raises:
        DataError: the file cannot be read.
    """

    def __init__(self, path: Path, accepted: str) -> None:
        self.path, self.accepted = path, accepted
        try:
            if not path.is_file() and path.exists():
                raise DataError(f"{path}: not a regular file; accepted: {accepted}")
            with open(path, "rb") as file:
                empty = os.fstat(file.fileno()).st_size == 0  # an empty file cannot be mapped
                self._map = None if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}; accepted: {accepted}") from error
        self.content: bytes | mmap.mmap = b"" if self._map is None else self._map

    def __len__(self) -> int:
        """Bytes."""
        return len(self.content)

    def check_size(self) -> None:
        """Raise DataError if the file has become shorter since it was opened: reading what is gone would end the process."""
        if self._map is not None and (size := self._map.size()) < len(self._map):
            raise DataError(f"{self.path}: {size} bytes, but {len(self._map)} when it was opened; accepted: a file that nobody writes to")


class Float32File:
    """A .npy file of float32 with one finite number for each of something, memory-mapped.

    Args:
        path: of the file.
        count: numbers that it must have.
        accepted: what the file should be, for messages.

    Raises:
        DataError: the file cannot be read, or is no such array.
    """

    def __init__(self, path: str, count: int, accepted: str) -> None:
        self._file = MappedFile(Path(path), accepted)
        shape, dtype, begin = self._header()
        if dtype != np.float32 or shape != (count,):
            raise DataError(f"{path}: {dtype} {list(shape)}; accepted: {accepted}")
        if len(self._file) != begin + 4 * count:
            raise DataError(f"{path}: {len(self._file)} bytes, {begin + 4 * count} expected (truncated?); accepted: {accepted}")
        self._values = np.frombuffer(self._file.content, dtype, count, begin)

    @property
    def values(self) -> NDArray[np.float32]:
        """float32 [count], read-only. Raises DataError if the file has become shorter."""
        self._file.check_size()
        return self._values

    def _header(self) -> tuple[tuple[int, ...], np.dtype, int]:
        """Shape, dtype and first byte of the values."""
        start = io.BytesIO(self._file.content[: 1 << 16])
        try:
            version = np.lib.format.read_magic(start)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(start)
        # numpy parses the header as Python and lets the parser's errors out; MemoryError is that of its stack.
        except (ValueError, EOFError, SyntaxError, TypeError, tokenize.TokenError, RecursionError, MemoryError) as error:
            raise DataError(f"{self._file.path}: {error}; accepted: {self._file.accepted}") from error
        return shape, dtype, start.tell()
