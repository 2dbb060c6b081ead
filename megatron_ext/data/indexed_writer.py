"""Write token documents as a Megatron .bin/.idx pair that appears whole or not at all."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np

from megatron_ext.atomic_io import fsync_directory
from megatron_ext.data.indexed import CHUNK, DTYPE_CODES, HEADER, MAGIC, VERSION, IndexedDataset, bin_path, index_path
from megatron_ext.errors import DataError


class IndexedDatasetWriter:
    """Stream documents into ``PREFIX.bin`` and ``PREFIX.idx``.

    Both files grow beside their final place, named ``*.partial``, and are renamed when the ``with`` block ends without an
    error, the .idx last. A process that was killed leaves only partial files, which the next writer overwrites. Memory does not grow
    with the number of documents.

    Args:
        prefix: path of the pair without ``.bin``/``.idx``; its folder must exist.
        dtype: integer type of the token ids in the file.

    Raises:
        DataError: the dtype is not an integer of the format, or another process writes the same prefix.
    """

    def __init__(self, prefix: str | Path, dtype: np.typing.DTypeLike) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._code = _dtype_code(self.dtype)
        self.num_documents = self.num_sequences = self.num_tokens = 0
        self._targets = bin_path(prefix), index_path(prefix)
        self._partials = tuple(path.with_name(f"{path.name}.partial") for path in self._targets)
        self._bin = _open_exclusive(self._partials[0])
        self._index = _open_exclusive(self._partials[1])
        self._boundaries = tempfile.TemporaryFile(dir=self._partials[1].parent)  # noqa: SIM115 (closed with the other two)
        self._write_header()
        self._boundaries.write(np.zeros(1, "<i8").tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._finish()
        for file in (self._bin, self._index, self._boundaries):
            file.close()
        for path in self._partials:
            path.unlink(missing_ok=True)

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, an integer array [tokens]."""
        self.add_many(tokens, np.array([len(tokens)]))

    def add_many(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents that lie one after the other in ``tokens``.

        Args:
            tokens: integers [sum(lengths)].
            lengths: tokens of each document, integers [documents].

        Raises:
            DataError: an id does not fit the file's dtype, or a document has 2**31 tokens or more.
        """
        assert len(tokens) == lengths.sum()
        self._bin.write(_as_dtype(tokens, self.dtype).tobytes())
        self._index.write(_as_dtype(lengths, np.dtype("<i4")).tobytes())
        self._boundaries.write((self.num_sequences + np.arange(1, len(lengths) + 1, dtype="<i8")).tobytes())
        self._count(len(lengths), len(lengths), len(tokens))

    def add_dataset(self, source: IndexedDataset) -> None:
        """Append all documents of another set, with their division into sequences.

        Raises:
            DataError: the dtypes differ.
        """
        if source.dtype != self.dtype:
            raise DataError(f"{source.index_path}: token ids are {source.dtype.name}, expected {self.dtype.name} as in the output")
        with open(source.bin_path, "rb") as file:
            shutil.copyfileobj(file, self._bin, CHUNK)
        self._index.write(source.sequence_lengths.tobytes())
        for begin in range(1, len(source) + 1, CHUNK):
            self._boundaries.write((self.num_sequences + source.document_boundaries[begin : begin + CHUNK]).tobytes())
        self._count(len(source), len(source.sequence_lengths), source.num_tokens)

    def _count(self, documents: int, sequences: int, tokens: int) -> None:
        self.num_documents += documents
        self.num_sequences += sequences
        self.num_tokens += tokens

    def _write_header(self) -> None:
        self._index.seek(0)
        self._index.write(HEADER.pack(MAGIC, VERSION, self._code, self.num_sequences, self.num_documents + 1))

    def _finish(self) -> None:
        """Complete the index and give both files their names."""
        self._write_header()
        self._index.seek(0, os.SEEK_END)
        self._index.flush()
        self._write_pointers()
        self._boundaries.seek(0)
        shutil.copyfileobj(self._boundaries, self._index, CHUNK)
        for file in (self._bin, self._index):
            file.flush()
            os.fsync(file.fileno())
        # An old index must not stand beside a new .bin, not even for a moment: the pair could look whole.
        self._targets[1].unlink(missing_ok=True)
        for partial, target in zip(self._partials, self._targets, strict=True):
            os.replace(partial, target)
        fsync_directory(self._targets[1].parent)

    def _write_pointers(self) -> None:
        """Append the byte offset of each sequence, from the lengths that are already in the file."""
        position = 0
        for begin in range(0, self.num_sequences, CHUNK):
            count = min(CHUNK, self.num_sequences - begin)
            lengths = os.pread(self._index.fileno(), 4 * count, HEADER.size + 4 * begin)
            sizes = np.frombuffer(lengths, "<i4").astype("<i8") * self.dtype.itemsize
            ends = position + np.cumsum(sizes)
            self._index.write((ends - sizes).tobytes())
            position = int(ends[-1])


def merge(prefix: str | Path, sources: Iterable[str | Path]) -> None:
    """Write the documents of several .bin/.idx pairs, in the order given, as one pair.

    Args:
        prefix: the pair to write, without ``.bin``/``.idx``.
        sources: prefixes of existing pairs of one dtype.

    Raises:
        DataError: no source, an unusable source, or sources of different dtypes.
    """
    datasets = [IndexedDataset(source) for source in sources]
    if not datasets:
        raise DataError(f"{prefix}: nothing to merge, expected at least one .bin/.idx prefix")
    with IndexedDatasetWriter(prefix, datasets[0].dtype) as writer:
        for dataset in datasets:
            writer.add_dataset(dataset)


def _dtype_code(dtype: np.dtype) -> int:
    for code, kind in DTYPE_CODES.items():
        if dtype == np.dtype(kind) and dtype.kind in "iu":
            return code
    raise DataError(f"dtype {dtype.name} cannot be stored as token ids, accepted: uint8, int8, int16, uint16, int32, int64")


def _open_exclusive(path: Path) -> IO[bytes]:
    """Open an empty file for writing that no other living process is writing."""
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(f"{path}: another process is writing this file") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    file.truncate()
    return file


def _as_dtype(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """``values`` as ``dtype``, or a DataError if one of them does not fit."""
    if values.dtype == dtype or not len(values):
        return values.astype(dtype, copy=False)
    limits = np.iinfo(dtype)
    low, high = int(values.min()), int(values.max())
    if low < limits.min or high > limits.max:
        raise DataError(f"values from {low} to {high} do not fit {dtype.name}, which holds {limits.min} to {limits.max}")
    return values.astype(dtype)
