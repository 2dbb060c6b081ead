"""Documents in pieces of powers of two: the binary decomposition of their lengths (Pouransari et al. 2024, "Dataset Decomposition",
arXiv:2405.13226)."""

from collections.abc import Iterator

import numpy as np

from megatron_ext.data.corpus import Corpus, Piece
from megatron_ext.data.permutation import Permutation


class Bucket:
    """The pieces of one length of a corpus, in an order that never ends; to a mixture it is a corpus of its own.

    A document of 11 tokens has a piece of 8, one of 2 and one of 1, in this order. The bucket of the largest size has several pieces of a
    document that is longer; the last bucket has what is shorter than the smallest size, in pieces of any length.

    Args:
        corpus: the documents.
        size: tokens of a piece, a power of two; 0: the pieces shorter than ``smallest``.
        smallest: smallest size, a power of two.
        largest: largest size, a power of two.
    """

    def __init__(self, corpus: Corpus, size: int, smallest: int, largest: int) -> None:
        self.name, self.max_epochs, self.held_out = corpus.name, None, corpus.held_out
        self._corpus, self._size, self._smallest, self._largest = corpus, size, smallest, largest
        documents, lengths = corpus.training_lengths()
        counts = _counts(lengths, size, smallest, largest)
        has_pieces = counts > 0
        self._documents, self._ends = documents[has_pieces], np.cumsum(counts[has_pieces])
        self.num_tokens = int(counts.sum()) * size if size else int((lengths & (smallest - 1)).sum())
        """Tokens of an epoch, both sides of the split together."""

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def training_tokens(self) -> float:
        """Tokens of an epoch of training, as far as is known without reading documents."""
        return self._corpus.training_tokens / self._corpus.num_tokens * self.num_tokens

    @property
    def trains(self) -> bool:
        """Whether any of its pieces is of a document that is not held out."""
        return not all(self._corpus.is_held_out(int(document)) for document in self._documents)

    def fingerprint(self) -> list[int]:
        """What makes the bucket of a corpus; the corpus has a fingerprint of its own."""
        return [self._size, self._smallest, self._largest]

    def pieces(
        self, source: int, seed: int, sequence_length: int, position: int, start: int, metadata: bool = True
    ) -> Iterator[tuple[int, Piece]]:
        """Pieces of documents to train on, for ever, from ``position`` on, with their positions: a position is a piece.

        Each run through the bucket is an epoch with an order of its own. ``sequence_length``, ``start`` and ``metadata`` have no meaning
        here: the bucket decides how long pieces are. Only of a bucket that ``trains``.
        """
        while True:
            epoch, place = divmod(position, len(self))
            number = Permutation(len(self), f"{seed}/{self.name}/{self._size}/{epoch}")[place]
            piece = self._piece(source, number)
            if not self._corpus.is_held_out(piece.document):
                yield position, piece
            position += 1

    def _piece(self, source: int, number: int) -> Piece:
        at = int(np.searchsorted(self._ends, number, side="right"))
        document = int(self._documents[at])
        length = self._corpus.length(document)
        if self._size == self._largest:
            start = (number - (int(self._ends[at - 1]) if at else 0)) * self._size
        else:
            # Larger pieces come first: before this one there is what the higher bits of the length count.
            start = length - length % (2 * self._size if self._size else self._smallest)
        stop = start + self._size if self._size else length
        return Piece(source, document, start, stop, stop < length)


def _counts(lengths: np.ndarray, size: int, smallest: int, largest: int) -> np.ndarray:
    """Pieces of a bucket that documents of these lengths have, int64."""
    if size == largest:
        return lengths // size
    return (lengths & (size or smallest - 1) > 0).astype(np.int64)


def sizes(smallest: int, largest: int) -> list[int]:
    """Sizes of the buckets, in rising order; 0 for pieces shorter than ``smallest``, of which there are none if it is 1."""
    powers = [1 << power for power in range(smallest.bit_length() - 1, largest.bit_length())]
    return powers if smallest == 1 else [0, *powers]
