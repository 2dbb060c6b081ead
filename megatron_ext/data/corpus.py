"""A corpus as training sees it: an indexed dataset with a name, a split, and an order that never ends."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_ext.data.indexed import IndexedDataset
from megatron_ext.data.options import SourceOptions
from megatron_ext.data.permutation import Permutation
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

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def loss_tokens(self) -> int:
        """Tokens that have a label: all but the last of a document. Cutting a document loses none."""
        return len(self) if self.has_next else len(self) - 1


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
        self.name = options.name
        self.path = options.path
        self.max_epochs = options.max_epochs
        self.held_out = held_out
        self.dataset = IndexedDataset(options.path)
        if self.dataset.num_tokens == 0:
            raise DataError(f"{options.path}.bin has no tokens (source {options.name!r})")

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def num_tokens(self) -> int:
        """Tokens of an epoch, both sides of the split together."""
        return self.dataset.num_tokens

    def fingerprint(self) -> str:
        """Hash of everything that decides which documents there are and their order, but for the seed and the split."""
        return self.dataset.fingerprint()

    def length(self, document: int) -> int:
        """Tokens of a document."""
        return int(self.dataset.lengths[document])

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of a document, in the dtype of the file."""
        return self.dataset.tokens(document, start, stop)

    def pieces(self, source: int, seed: int, sequence_length: int, position: int, start: int) -> Iterator[tuple[int, Piece]]:
        """Pieces of documents to train on, for ever, from token ``start`` of the document at ``position`` on; with their positions."""
        for place, document in self.shuffled(str(seed), position):
            yield from ((place, piece) for piece in cut(source, document, self.length(document), sequence_length, start))
            start = 0

    def is_held_out(self, document: int) -> bool:
        """True if the document belongs to validation."""
        if self.held_out == 0.0:
            return False
        length = self.length(document)
        head = self.tokens(document, 0, min(length, HASHED_TOKENS)).astype("<i8").tobytes()
        digest = hashlib.blake2b(head + length.to_bytes(8, "little"), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.held_out * 2**64

    def shuffled(self, seed: str, position: int, held_out: bool = False) -> Iterator[tuple[int, int]]:
        """Non-empty documents of one side of the split in random order, for ever, from ``position`` on.

        Yields:
            (position, document). Each run through the corpus (``len(self)`` positions) is an epoch with an order of its own.

        Raises:
            DataError: no document of the corpus is on this side of the split.
        """
        fruitless = 0
        while True:
            epoch, place = divmod(position, len(self))
            document = self._order(seed, epoch)[place]
            if self.length(document) > 0 and self.is_held_out(document) == held_out:
                fruitless = 0
                yield position, document
            else:
                fruitless += 1
                if fruitless > 2 * len(self):
                    side = "validation" if held_out else "training"
                    raise DataError(
                        f"{self.path}: none of {len(self)} documents is left for {side} (data.validation_fraction={self.held_out})"
                    )
            position += 1

    def _order(self, seed: str, epoch: int) -> Permutation:
        return Permutation(len(self), f"{seed}/{self.name}/{epoch}")


def cut(source: int, document: int, length: int, sequence_length: int, start: int = 0) -> Iterator[Piece]:
    """The pieces of at most ``sequence_length`` tokens of a document, from token ``start`` on."""
    while start < length:
        stop = min(start + sequence_length, length)
        yield Piece(source, document, start, stop, has_next=stop < length)
        start = stop
