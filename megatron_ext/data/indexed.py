"""Token documents on disk in Megatron's .bin/.idx format.

``PREFIX.bin`` holds the token ids of all documents one after the other. ``PREFIX.idx`` says where they are: a 34-byte header (magic,
version, dtype code, number of sequences, number of document boundaries), then int32 tokens per sequence, int64 byte offset per sequence,
and int64 document boundaries counted in sequences. All integers are little-endian.
"""

import hashlib
import mmap
import struct
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_ext.data.mapped import MappedFile
from megatron_ext.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
ACCEPTED = "a .bin/.idx pair of one prefix"
CHUNK = 1 << 20  # index entries handled at once, so that opening a large set needs little memory


def bin_path(prefix: str | Path) -> Path:
    """Path of the token file of ``prefix``."""
    return Path(f"{prefix}.bin")


def index_path(prefix: str | Path) -> Path:
    """Path of the index file of ``prefix``."""
    return Path(f"{prefix}.idx")


class IndexedDataset:
    """The documents of a .bin/.idx pair, memory-mapped.

    A document of several sequences is their concatenation. Opening checks the whole index against the size of the .bin, so that reading
    cannot fail later; the .bin itself is not read.

    Args:
        prefix: path of the pair without ``.bin``/``.idx``.

    Raises:
        DataError: a file is missing, truncated or garbled, the two do not belong together, or the ids are not integers.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.bin_path, self.index_path = bin_path(prefix), index_path(prefix)
        self._index, self._bin = MappedFile(self.index_path, ACCEPTED), MappedFile(self.bin_path, ACCEPTED)
        index = self._index.content
        self.dtype, sequences, boundaries = self._read_header(index)
        arrays = HEADER.size
        self._sequence_lengths = np.frombuffer(index, "<i4", sequences, arrays)
        self._pointers = np.frombuffer(index, "<i8", sequences, arrays + 4 * sequences)
        self._boundaries = np.frombuffer(index, "<i8", boundaries, arrays + 12 * sequences)
        self._tokens = self._map_tokens()
        self._check_sequences()
        self._check_boundaries()

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._boundaries) - 1

    def __reduce__(self) -> tuple[type["IndexedDataset"], tuple[str]]:
        return IndexedDataset, (self.prefix,)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return len(self._tokens)

    @property
    def sequence_lengths(self) -> np.ndarray:
        """Tokens of each sequence, int32 [sequences], memory-mapped."""
        return self._sequence_lengths

    @property
    def document_boundaries(self) -> np.ndarray:
        """Document ``d`` is sequences ``boundaries[d]`` up to ``boundaries[d + 1]``; int64 [documents + 1], memory-mapped."""
        return self._boundaries

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents], read-only; 8 bytes a document, less than half of the .idx."""
        lengths = np.empty(len(self), dtype=np.int64)
        for begin in range(0, len(self), CHUNK):
            starts = self._starts(self._boundaries[begin : begin + CHUNK + 1])
            lengths[begin : begin + CHUNK] = np.diff(starts)
        lengths.setflags(write=False)
        return lengths

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens ``start`` up to ``stop`` (default: the end) of a document.

        Returns:
            a read-only 1-D view into the mapped .bin, of the file's dtype; no other byte of the file is touched.

        Raises:
            IndexError: no such document, or a range that is not inside it.
            DataError: one of the files has become shorter since it was opened.
        """
        self._index.check_size()
        self._bin.check_size()
        if not 0 <= document < len(self):
            raise IndexError(f"{self.prefix}: document {document} of {len(self)}")
        begin, end = (int(offset) for offset in self._starts(self._boundaries[document : document + 2]))
        stop = end - begin if stop is None else stop
        if not 0 <= start <= stop <= end - begin:
            raise IndexError(f"{self.prefix}: tokens [{start}, {stop}) of document {document}, which has {end - begin}")
        return self._tokens[begin + start : begin + stop]

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the .idx and the size of the .bin; the .bin is not read."""
        with open(self.index_path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        digest.update(struct.pack("<Q", self._tokens.nbytes))
        return digest.hexdigest()

    def _starts(self, sequences: np.ndarray) -> np.ndarray:
        """Index of the first token of each sequence; one past the last sequence is the end of the file."""
        inside = np.minimum(sequences, max(len(self._pointers) - 1, 0))
        starts = self._pointers[inside] // self.dtype.itemsize if len(self._pointers) else np.zeros_like(sequences)
        return np.where(sequences == len(self._pointers), len(self._tokens), starts)

    def _read_header(self, index: bytes | mmap.mmap) -> tuple[np.dtype, int, int]:
        """The dtype, the number of sequences and the number of document boundaries."""
        if len(index) < HEADER.size:
            raise DataError(f"{self.index_path}: {len(index)} bytes, expected a header of {HEADER.size} (truncated?)")
        magic, version, code, sequences, boundaries = HEADER.unpack_from(index)
        if magic != MAGIC or version != VERSION:
            raise DataError(f"{self.index_path}: starts with {magic!r} version {version}, expected {MAGIC!r} version {VERSION}")
        dtype = np.dtype(DTYPE_CODES.get(code, np.void))
        if dtype.kind not in "iu":
            accepted = ", ".join(f"{code} ({kind.__name__})" for code, kind in DTYPE_CODES.items() if np.dtype(kind).kind in "iu")
            raise DataError(f"{self.index_path}: dtype code {code} ({dtype.name}) is not an integer type, accepted: {accepted}")
        expected = HEADER.size + 12 * sequences + 8 * boundaries
        if len(index) == expected + sequences and sequences:
            raise DataError(f"{self.index_path}: has sequence modes (multimodal data), expected text only")
        if len(index) != expected:
            raise DataError(
                f"{self.index_path}: {len(index)} bytes, expected {expected} for {sequences} sequences and {boundaries} document boundaries"
            )
        return dtype.newbyteorder("<"), sequences, boundaries

    def _map_tokens(self) -> np.ndarray:
        if len(self._bin) % self.dtype.itemsize:
            raise DataError(f"{self.bin_path}: {len(self._bin)} bytes, expected a multiple of {self.dtype.itemsize} ({self.dtype.name})")
        return np.frombuffer(self._bin.content, self.dtype)

    def _check_sequences(self) -> None:
        """The sequences lie one after the other in the .bin and fill it."""
        position = 0
        for begin in range(0, len(self._pointers), CHUNK):
            lengths = self._sequence_lengths[begin : begin + CHUNK].astype(np.int64)
            ends = position + np.cumsum(lengths * self.dtype.itemsize)
            bad = (lengths < 0) | (self._pointers[begin : begin + CHUNK] != ends - lengths * self.dtype.itemsize)
            if bad.any():
                at = int(bad.argmax())
                raise DataError(
                    f"{self.index_path}: sequence {begin + at} has {lengths[at]} tokens at byte {self._pointers[begin + at]}, "
                    f"expected at byte {ends[at] - lengths[at] * self.dtype.itemsize}, where the sequence before it ends"
                )
            position = int(ends[-1])
        if position != self._tokens.nbytes:
            raise DataError(f"{self.bin_path}: {self._tokens.nbytes} bytes, expected {position} according to {self.index_path}")

    def _check_boundaries(self) -> None:
        """The document boundaries run from the first sequence to the last."""
        boundaries = self._boundaries
        rising = all(np.all(np.diff(boundaries[begin : begin + CHUNK + 1]) >= 0) for begin in range(0, len(boundaries), CHUNK))
        if not len(boundaries) or boundaries[0] != 0 or boundaries[-1] != len(self._pointers) or not rising:
            ends = f"{boundaries[0]} to {boundaries[-1]}" if len(boundaries) else "empty"
            raise DataError(f"{self.index_path}: document boundaries are {ends}, expected to rise from 0 to {len(self._pointers)}")
