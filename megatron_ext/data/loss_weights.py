"""Weights of token losses, by document and by token: what a step's loss is the weighted mean of."""

import hashlib
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_ext.data.corpus import Corpus, Piece
from megatron_ext.data.mapped import Float32File
from megatron_ext.errors import DataError

Weights = float | NDArray[np.float32]
"""One for all tokens, or one for each."""
CHUNK = 2**22
"""Values of a file that are checked at once."""


class LossWeights(Protocol):
    """The weights of one step's losses: functions of documents and the step, never of ranks or packs."""

    def of(self, number: int, piece: Piece, predicted: slice) -> Weights:
        """Of the losses of predicting tokens ``predicted`` of the document of ``piece``, which is number ``number`` of the step.

        At least 0; the number is rounded to float32.
        """


def total_weight(pieces: Sequence[Piece], weights: LossWeights | None) -> float:
    """Sum of the weights of all losses of a step, by which the sum of its weighted losses is divided; without weights, their number."""
    if weights is None:
        return float(sum(piece.loss_tokens for piece in pieces))
    sums = []
    for number, piece in enumerate(pieces):
        here = weights.of(number, piece, slice(piece.first_predicted, piece.first_predicted + piece.loss_tokens))
        constant = isinstance(here, float)
        sums.append(float(np.float32(here)) * piece.loss_tokens if constant else float(np.sum(here, dtype=np.float64)))
    return math.fsum(sums)


class SourceWeights:
    """The ``LossWeights`` that sources bring in files.

    Args:
        files: of each source, by its number; None: its weights are 1.
    """

    def __init__(self, files: "Sequence[WeightFiles | None]") -> None:
        self._files = files

    def fingerprint(self) -> str:
        """Hash of the weights of all sources."""
        return hashlib.blake2b(" ".join(str(files and files.fingerprint()) for files in self._files).encode(), digest_size=16).hexdigest()

    def of(self, number: int, piece: Piece, predicted: slice) -> Weights:
        """See ``LossWeights``."""
        files = self._files[piece.source]
        return 1.0 if files is None else files.of(piece.document, predicted)


class WeightFiles:
    """Weights of one source in .npy files of float32, memory-mapped: one for each document, one for each token, or both, multiplied.

    Args:
        corpus: that they belong to, whose options name them.

    Raises:
        DataError: a file cannot be read, is of another dtype or length, or has a value that is negative or not finite.
    """

    def __init__(self, corpus: Corpus) -> None:
        options, lengths = corpus.options, corpus.dataset.lengths
        self._documents = _load(options.document_weights, len(lengths), "documents", options.name)
        self._tokens = _load(options.token_weights, corpus.dataset.num_tokens, "tokens", options.name)
        self._first = np.cumsum(lengths) - lengths

    def of(self, document: int, tokens: slice) -> Weights:
        """Weights of some tokens of a document."""
        constant = 1.0 if self._documents is None else float(self._documents.values[document])
        if self._tokens is None:
            return constant
        first = int(self._first[document])
        return self._tokens.values[first + tokens.start : first + tokens.stop] * np.float32(constant)

    def fingerprint(self) -> str:
        """Hash of all weights."""
        digest = hashlib.blake2b(digest_size=16)
        for values in (self._documents, self._tokens):
            digest.update(b"none" if values is None else np.ascontiguousarray(values.values))
        return digest.hexdigest()


def source_weights(corpora: Sequence[Corpus]) -> SourceWeights | None:
    """The weights that sources bring; None if none of them does. Raises as ``WeightFiles``."""
    files = [WeightFiles(corpus) if corpus.options.is_weighted else None for corpus in corpora]
    return SourceWeights(files) if any(files) else None


def _load(path: str | None, count: int, of_what: str, source: str) -> Float32File | None:
    if path is None:
        return None
    file = Float32File(path, count, f"float32 [{count}], a weight for each of the {of_what} of source {source!r}, in a .npy file")
    values = file.values
    for begin in range(0, count, CHUNK):
        chunk = values[begin : begin + CHUNK]
        wrong = ~(np.isfinite(chunk) & (chunk >= 0))
        if wrong.any():
            at = int(wrong.argmax())
            raise DataError(f"{path}: value {begin + at} is {chunk[at]}; accepted are finite weights of at least 0")
    return file
