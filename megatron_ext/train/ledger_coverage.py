"""Which documents the rows of a ledger have read, by the lengths of documents alone: no sampler tells what was due."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from megatron_ext.data.corpus import Corpus


class Coverage(Protocol):
    """Watches the pieces of one source."""

    def problems(self, pieces: Iterable[list[int]]) -> Iterator[str]:
        """What is wrong with the next pieces, [document, first token, token behind the last]."""

    def epochs(self) -> dict[str, int]:
        """Complete epochs, by what they are of."""


class WholeDocuments:
    """Each document is read from its first token to its last, and no other way than once, before the next epoch."""

    def __init__(self, corpus: Corpus) -> None:
        self._name = corpus.name
        self._lengths = _trained_lengths(corpus)
        self._unread = set(self._lengths)
        self._open: tuple[int, int] | None = None
        """A document that was read in part, and its next token."""
        self._epochs = 0

    def epochs(self) -> dict[str, int]:
        """As in ``Coverage``: of the source."""
        return {self._name: self._epochs}

    def problems(self, pieces: Iterable[list[int]]) -> Iterator[str]:
        """As in ``Coverage``."""
        for document, start, stop in pieces:
            what = f"source {self._name!r}, document {document}, tokens {start} to {stop}"
            if self._open is not None and self._open != (document, start):
                yield f"{what}: read when document {self._open[0]} was due from token {self._open[1]} on"
            elif self._open is None and document not in self._unread:
                why = f"read twice in epoch {self._epochs}" if document in self._lengths else "not a document to train on"
                yield f"{what}: {why}, before {len(self._unread)} others were read"
            elif self._open is None and start > 0:
                yield f"{what}: its first {start} tokens were not read"
            elif stop > self._lengths.get(document, 0):
                yield f"{what}: the document has {self._lengths.get(document, 0)} tokens"
            self._open = (document, stop) if stop < self._lengths.get(document, 0) else None
            if self._open is None:
                self._unread.discard(document)
            if not self._unread:
                self._unread, self._epochs = set(self._lengths), self._epochs + 1


class Decomposed:
    """Each of the pieces that a document is cut into, which add up to it, is read once before any other of its length is read again."""

    def __init__(self, corpus: Corpus, smallest: int, largest: int) -> None:
        self._name, self._smallest = corpus.name, smallest
        self._pieces: dict[int, set[tuple[int, int, int]]] = {}
        """By bucket: the length of its pieces, or 0 for those that are shorter than ``smallest``."""
        for document, length in _trained_lengths(corpus).items():
            for start, stop in binary_pieces(length, smallest, largest):
                self._pieces.setdefault(self._bucket(stop - start), set()).add((document, start, stop))
        self._unread = {bucket: set(pieces) for bucket, pieces in self._pieces.items()}
        self._epochs = dict.fromkeys(self._pieces, 0)

    def epochs(self) -> dict[str, int]:
        """As in ``Coverage``: of the pieces of each length."""
        names = {bucket: f"of {bucket} tokens" if bucket else f"of less than {self._smallest} tokens" for bucket in self._epochs}
        return {f"{self._name}, pieces {names[bucket]}": self._epochs[bucket] for bucket in sorted(self._epochs)}

    def problems(self, pieces: Iterable[list[int]]) -> Iterator[str]:
        """As in ``Coverage``."""
        for document, start, stop in pieces:
            what = f"source {self._name!r}, document {document}, tokens {start} to {stop}"
            bucket = self._bucket(stop - start)
            if (document, start, stop) not in self._pieces.get(bucket, ()):
                yield f"{what}: not one of the pieces that documents to train on are cut into"
                continue
            unread = self._unread[bucket]
            if (document, start, stop) not in unread:
                yield f"{what}: read twice in epoch {self._epochs[bucket]} of its length, before {len(unread)} other pieces were read"
            unread.discard((document, start, stop))
            if not unread:
                self._unread[bucket], self._epochs[bucket] = set(self._pieces[bucket]), self._epochs[bucket] + 1

    def _bucket(self, size: int) -> int:
        return size if size >= self._smallest else 0


def binary_pieces(length: int, smallest: int, largest: int) -> Iterator[tuple[int, int]]:
    """First token and token behind the last of the pieces of a document, longest first: as many of ``largest`` tokens as there is room for,
    one for each power of two below in what is left, and what is shorter than ``smallest``."""
    start = 0
    for size in [largest] * (length // largest) + [1 << power for power in reversed(range(largest.bit_length() - 1))]:
        if size >= smallest and start + size <= length:
            yield start, start + size
            start += size
    if start < length:
        yield start, length


def _trained_lengths(corpus: Corpus) -> dict[int, int]:
    """Tokens of every document to train on that has any."""
    documents, lengths = corpus.training_lengths()
    both = ((int(document), int(length)) for document, length in zip(documents, lengths, strict=True))
    return {document: length for document, length in both if length > 0 and not corpus.is_held_out(document)}
