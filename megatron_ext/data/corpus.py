"""A corpus as training sees it: an indexed dataset with a name, a split, and an order that never ends."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_ext.data.indexed import IndexedDataset
from megatron_ext.data.metadata import read_metadata
from megatron_ext.data.options import SourceOptions
from megatron_ext.data.permutation import Permutation
from megatron_ext.data.selection import Selection
from megatron_ext.errors import DataError

HASHED_TOKENS = 256


@dataclass(frozen=True)
class Piece:
    """Tokens ``start`` to ``stop`` (exclusive) of one document of source number ``source``; ``has_next``: token ``stop`` exists too."""

    source: int
    document: int
    start: int
    stop: int
    has_next: bool
    prefix: int = 0
    """Tokens of metadata before the first of the document. They are read, and count as tokens of the piece, but are not predicted."""

    def __len__(self) -> int:
        return self.prefix + self.stop - self.start

    @property
    def first_predicted(self) -> int:
        """First token of the document that is predicted: the one behind the first that is read, or behind metadata."""
        return self.start + (self.prefix == 0)

    @property
    def loss_tokens(self) -> int:
        """Tokens that are predicted: all of a document but the first, and that too behind metadata. Cutting a document loses none."""
        return self.stop + self.has_next - self.first_predicted


class Corpus:
    """Documents of one .bin/.idx pair, split into training and validation by document hash.

    Args:
        options: name and path.
        held_out: share of documents that belong to validation. The hash is of a document's first 256 tokens and its length, so equal
            documents fall on the same side in every run and every corpus.

    Raises:
        DataError: the pair cannot be read or has no tokens.
    """

    def __init__(self, options: SourceOptions, held_out: float = 0.0) -> None:
        self.options = options
        self.name = options.name
        self.path = options.path
        self.max_epochs = options.max_epochs
        self.held_out = held_out
        self.dataset = IndexedDataset(options.path)
        if self.dataset.num_tokens == 0:
            raise DataError(f"{options.path}.bin has no tokens (source {options.name!r})")
        self.metadata = read_metadata(options, len(self.dataset)) if options.metadata else None
        self._selection = Selection(options, self.dataset, self.is_held_out) if options.selects else None
        self.is_sorted = options.order != "shuffled"
        """Documents are trained on by score."""

    def __len__(self) -> int:
        """Positions of an epoch of training."""
        return self.positions(held_out=False)

    @property
    def num_tokens(self) -> int:
        """Tokens of the documents that are read, both sides of the split together."""
        chosen = self._documents(held_out=False)
        return self.dataset.num_tokens if chosen is None else int(self.dataset.lengths[chosen].sum())

    @property
    def training_tokens(self) -> float:
        """Tokens of an epoch of training. How many are held out is expected, not counted; a subset has none."""
        whole = self._selection is not None and self._selection.is_subset
        return self.num_tokens * (1.0 if whole else 1.0 - self.held_out)

    def fingerprint(self) -> object:
        """What decides which documents there are and their order, but for the seed and the split; a JSON value."""
        own = self.dataset.fingerprint()
        metadata = {} if self.metadata is None else {"metadata": self.metadata.fingerprint()}
        selection = {} if self._selection is None else {"selection": self._selection.fingerprint()}
        return [own, {**metadata, **selection}] if metadata or selection else own

    def positions(self, held_out: bool) -> int:
        """Positions of a run through one side of the split: documents of the other side are passed over."""
        documents = self._documents(held_out)
        return len(self.dataset) if documents is None else len(documents)

    def _documents(self, held_out: bool) -> np.ndarray | None:
        """Documents among which those of a side are; None: all."""
        if self._selection is None:
            return None
        return self._selection.eligible if held_out else self._selection.chosen

    def length(self, document: int) -> int:
        """Tokens of a document."""
        return int(self.dataset.lengths[document])

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of a document, in the dtype of the file."""
        return self.dataset.tokens(document, start, stop)

    def pieces(
        self, source: int, seed: int, sequence_length: int, position: int, start: int, metadata: bool = True
    ) -> Iterator[tuple[int, Piece]]:
        """Pieces of documents to train on, for ever, from token ``start`` of the document at ``position`` on; with their positions.

        ``metadata``: documents begin with theirs, where the source has any; they are shorter than ``sequence_length``.
        """
        documents = self._sorted(str(seed), position) if self.is_sorted else self.shuffled(str(seed), position)
        for place, document in documents:
            described = metadata and self.metadata is not None and start == 0
            prefix = int(self.metadata.lengths[document]) if described else 0
            yield from ((place, piece) for piece in cut(source, document, self.length(document), sequence_length, start, prefix))
            start = 0

    def check_metadata(self, sequence_length: int) -> None:
        """Raise DataError if the metadata of a document leave no room for it in a sequence."""
        if self.metadata is None:
            return
        documents, _ = self.training_lengths()
        document = int(documents[self.metadata.lengths[documents].argmax()])
        if (tokens := int(self.metadata.lengths[document])) >= sequence_length:
            raise DataError(
                f"{self.metadata.bin_path}: document {document} of source {self.name!r} has {tokens} tokens of metadata; "
                f"accepted: fewer than data.sequence_length ({sequence_length})"
            )

    def is_held_out(self, document: int) -> bool:
        """True if the document belongs to validation."""
        if self.held_out == 0.0:
            return False
        length = self.length(document)
        head = self.tokens(document, 0, min(length, HASHED_TOKENS)).astype("<i8").tobytes()
        digest = hashlib.blake2b(head + length.to_bytes(8, "little"), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.held_out * 2**64

    def training_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Documents to train on, held-out ones among them unless there is a subset, and their lengths; both int64."""
        chosen = self._documents(held_out=False)
        documents = np.arange(len(self.dataset)) if chosen is None else chosen
        return documents, self.dataset.lengths[documents]

    def check_side(self, documents: np.ndarray) -> None:
        """Raise DataError if all of ``documents`` are held out."""
        if all(self.is_held_out(int(document)) for document in documents):
            raise self._nothing_left(len(documents), "training")

    def _nothing_left(self, documents: int, side: str) -> DataError:
        return DataError(f"{self.path}: none of {documents} documents is left for {side} (data.validation_fraction={self.held_out})")

    def shuffled(self, seed: str, position: int, held_out: bool = False) -> Iterator[tuple[int, int]]:
        """Non-empty documents of one side of the split in random order, for ever, from ``position`` on.

        Yields:
            (position, document). Each run through the corpus (``positions(held_out)``) is an epoch with an order of its own.

        Raises:
            DataError: no document of the corpus is on this side of the split.
        """
        documents = self._documents(held_out)
        if documents is None:
            return self._walk(lambda epoch: self._order(seed, epoch, len(self.dataset)), position, held_out)
        return self._walk(lambda epoch: _Reordered(documents, self._order(seed, epoch, len(documents))), position, held_out)

    def _sorted(self, seed: str, position: int) -> Iterator[tuple[int, int]]:
        """As ``shuffled``, of the training side, by score: every epoch is alike."""
        assert self._selection is not None, "an order needs scores"
        documents = self._selection.sorted(seed)
        return self._walk(lambda epoch: documents, position, held_out=False)

    def _walk(self, order: Callable[[int], "_Items"], position: int, held_out: bool) -> Iterator[tuple[int, int]]:
        """Positions and documents of one side, ``order(epoch)[place]`` at each."""
        fruitless, size = 0, self.positions(held_out)
        while True:
            epoch, place = divmod(position, size)
            document = int(order(epoch)[place])
            if self.length(document) > 0 and self.is_held_out(document) == held_out:
                fruitless = 0
                yield position, document
            else:
                fruitless += 1
                if fruitless > 2 * size:
                    side = "validation" if held_out else "training"
                    raise self._nothing_left(size, side)
            position += 1

    def _order(self, seed: str, epoch: int, size: int) -> Permutation:
        return Permutation(size, f"{seed}/{self.name}/{epoch}")


class _Items(Protocol):
    """Documents in an order."""

    def __getitem__(self, place: int, /) -> int: ...


@dataclass(frozen=True)
class _Reordered:
    """Items in the order of a permutation."""

    items: np.ndarray
    order: Permutation

    def __getitem__(self, place: int) -> int:
        return self.items[self.order[place]]


def cut(source: int, document: int, length: int, sequence_length: int, start: int = 0, prefix: int = 0) -> Iterator[Piece]:
    """The pieces of at most ``sequence_length`` tokens of a document, from token ``start`` on; the first with ``prefix`` of them before."""
    while start < length:
        stop = min(start + sequence_length - prefix, length)
        yield Piece(source, document, start, stop, stop < length, prefix)
        start, prefix = stop, 0
