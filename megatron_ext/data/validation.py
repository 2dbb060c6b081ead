"""Validation sets: a fixed choice of documents, the same for every run with the same files and limits."""

import math
from dataclasses import dataclass

import numpy as np

from megatron_ext.data.corpus import Corpus, Piece, cut
from megatron_ext.data.options import DataOptions
from megatron_ext.errors import DataError


@dataclass(frozen=True)
class ValidationSet:
    """Pieces of one corpus. ``split`` is "validation" for a corpus of its own, "held_out" for the rest of a training corpus."""

    corpus: Corpus
    split: str
    pieces: list[Piece]

    @property
    def name(self) -> str:
        """Name of the corpus."""
        return self.corpus.name

    def unigram_entropy(self) -> float:
        """Entropy of the distribution of the labels, in nats: the loss of the best model that ignores all context."""
        counts = np.zeros(0, dtype=np.int64)
        for piece in self.pieces:
            labels = self.corpus.tokens(piece.document, piece.start + 1, piece.stop + piece.has_next).astype(np.int64)
            found = np.bincount(labels, minlength=len(counts))
            found[: len(counts)] += counts
            counts = found
        shares = counts[counts > 0] / max(1, counts.sum())
        return -math.fsum(shares * np.log(shares))


def validation_sets(data: DataOptions, training: list[Corpus], most_tokens: int) -> list[ValidationSet]:
    """The sets of a run: each corpus of ``data.validation``, then the held-out side of each training corpus that has one.

    Args:
        data: the data section.
        training: the training corpora.
        most_tokens: tokens of each set; documents are chosen at random, but always the same. They are cut at the longest sequence of all
            stages, so that losses of all stages compare.

    Raises:
        DataError: a corpus cannot be read or has no document for validation.
    """
    own = [_choose(Corpus(options), "validation", data.longest_sequence, most_tokens) for options in data.validation]
    held_out = [_choose(corpus, "held_out", data.longest_sequence, most_tokens) for corpus in training if corpus.held_out > 0.0]
    return own + held_out


def _choose(corpus: Corpus, split: str, sequence_length: int, most_tokens: int) -> ValidationSet:
    pieces: list[Piece] = []
    room = most_tokens
    for position, document in corpus.shuffled("validation", 0, held_out=split == "held_out"):
        if position >= corpus.positions(split == "held_out") or room <= 0:
            break
        for piece in cut(0, document, corpus.length(document), sequence_length):
            if room > 0 and piece.loss_tokens > 0:
                pieces.append(piece)
                room -= len(piece)
    if not pieces:
        raise DataError(f"{corpus.path}.bin has no document of at least two tokens for validation (source {corpus.name!r})")
    return ValidationSet(corpus, split, pieces)
