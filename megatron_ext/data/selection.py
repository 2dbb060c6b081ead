"""Which documents of a corpus are read, and in which order: by length, by a budget of tokens, by scores from a file."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_ext.data.indexed import IndexedDataset
from megatron_ext.data.mapped import Float32File
from megatron_ext.data.options import SourceOptions
from megatron_ext.data.permutation import hashes
from megatron_ext.errors import DataError

CHUNK = 1 << 20
"""Bytes read at once for a hash."""


def read_scores(options: SourceOptions, documents: int) -> np.ndarray:
    """The scores of a source's documents, float32 [documents].

    Raises:
        DataError: the file cannot be read or is no float32 array with a finite number for each document.
    """
    assert options.scores is not None, "asked for by the caller"
    wanted = f"a .npy file of float32 [{documents:,}], a score for each document of source {options.name!r}"
    scores = np.array(Float32File(options.scores, documents, wanted).values)
    if not np.isfinite(scores).all():
        bad = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise DataError(
            f"{options.scores}: the score of document {bad} of source {options.name!r} is {scores[bad]}; accepted: finite numbers"
        )
    return scores


class Selection:
    """The documents of a source that its options leave.

    Args:
        options: of the source.
        dataset: its documents.
        is_held_out: whether a document belongs to validation; such documents take no room in a subset.

    Raises:
        DataError: no document is left, the subset is larger than what is left, or the scores cannot be used.
    """

    def __init__(self, options: SourceOptions, dataset: IndexedDataset, is_held_out: Callable[[int], bool]) -> None:
        self._options, self._lengths = options, dataset.lengths
        self._scores = read_scores(options, len(dataset)) if options.scores else None
        self.eligible = self._of_length()
        """Documents of an accepted length, int64 in rising order; None: all."""
        subset = None if options.subset_tokens is None else self._subset(options.subset_tokens, is_held_out)
        self.chosen = self.eligible if subset is None else subset
        """Those of them to train on, with held-out ones among them unless there is a subset."""

    @property
    def is_subset(self) -> bool:
        """Whether the chosen documents are all for training."""
        return self._options.subset_tokens is not None

    def _of_length(self) -> np.ndarray | None:
        least, most = self._options.min_tokens, self._options.max_tokens
        if least is None and most is None:
            return None
        inside = self._lengths >= (least or 0)
        if most is not None:
            inside &= self._lengths <= most
        if not self._lengths[inside].any():
            raise DataError(
                f"{self._options.path}: none of {len(self._lengths):,} documents of source {self._options.name!r} has "
                f"{least or 1} to {most or 'any number of'} tokens (min_tokens, max_tokens); the longest has {int(self._lengths.max()):,}"
            )
        return np.flatnonzero(inside)

    def _subset(self, most_tokens: int, is_held_out: Callable[[int], bool]) -> np.ndarray:
        """Documents in order of preference until they have ``most_tokens`` together."""
        taken, room = [], most_tokens
        for document in self._preferred(best_first=self._options.subset_by == "score"):
            if room <= 0:
                break
            if self._lengths[document] and not is_held_out(int(document)):
                taken.append(document)
                room -= int(self._lengths[document])
        if room > 0:
            raise DataError(
                f"source {self._options.name!r} has {most_tokens - room:,} tokens to train on; its subset_tokens is {most_tokens:,}"
            )
        return np.sort(np.array(taken, dtype=np.int64))

    def _preferred(self, best_first: bool) -> np.ndarray:
        documents = np.arange(len(self._lengths)) if self.eligible is None else self.eligible
        return documents[self._ranks(documents, f"subset/{self._options.name}", descending=True, by_score=best_first)]

    def sorted(self, seed: str) -> np.ndarray:
        """The chosen documents by score, as ``options.order`` says. ``seed`` decides between equal scores."""
        documents = np.arange(len(self._lengths)) if self.chosen is None else self.chosen
        descending = self._options.order == "descending"
        return documents[self._ranks(documents, f"{seed}/{self._options.name}", descending, by_score=True)]

    def _ranks(self, documents: np.ndarray, seed: str, descending: bool, by_score: bool) -> np.ndarray:
        """Places of ``documents`` by score, those of equal scores and all others in a random order of ``seed``."""
        random = hashes(documents, seed)
        if not by_score:
            return np.argsort(random, kind="stable")
        assert self._scores is not None, "the options ask for scores"
        scores = self._scores[documents]
        return np.lexsort((random, -scores if descending else scores))

    def fingerprint(self) -> list[object]:
        """What decides the choice and the order, as JSON values."""
        options = self._options
        limits = [options.min_tokens, options.max_tokens, options.subset_tokens, options.subset_by, options.order]
        return [*limits, _file_hash(Path(options.scores)) if options.scores else None]


def _file_hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()
