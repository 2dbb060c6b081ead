"""Documents with a needle: a key and its value somewhere in other text, and the key again at the end, after which the value is due.

No tokenizer is needed. Key and value are tokens that the text has too, so that none of them is one that the model never saw.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.data.corpus import Piece
from megatron_ext.data.validation import ValidationSet
from megatron_ext.errors import DataError

_MOST_DRAWS = 100


@dataclass(frozen=True)
class Haystack:
    """Text to hide needles in: the tokens of validation sets, one after another, from a random place on, and again from the begin."""

    tokens: np.ndarray
    """int64 [tokens]."""
    vocabulary: np.ndarray
    """The distinct ones, ascending."""
    path: str
    """Where they come from, for messages."""

    @classmethod
    def of(cls, sets: Sequence[ValidationSet]) -> "Haystack":
        """All tokens of ``sets``, at least one set."""
        pieces = [each.corpus.tokens(piece.document, piece.start, piece.stop) for each in sets for piece in each.pieces]
        tokens = np.concatenate(pieces).astype(np.int64)
        return cls(tokens, np.unique(tokens), sets[0].corpus.path)

    def check(self, words: int) -> None:
        """Raise DataError if there are fewer distinct tokens than ``words``, a key and its value together."""
        if len(self.vocabulary) < words:
            seen = len(self.vocabulary)
            raise DataError(f"{self.path}.bin has {seen} different tokens for validation; a key and its value need {words}")


@dataclass(frozen=True)
class Needle:
    """One document, a pure function of its fields: text, key, value, text, key, value. ``read_pack`` reads it like a corpus of one.

    Raises:
        DataError: when it is read, if every key that is drawn occurs in the text by chance.
    """

    haystack: Haystack
    """Whose ``check`` has passed."""
    length: int
    """Tokens of the document, both keys and values included."""
    depth: float
    """Share of the text before the needle, from 0 to 1."""
    number: int
    """Tells samples of one length and depth apart."""
    key_tokens: int
    value_tokens: int
    seed: int

    @property
    def path(self) -> str:
        """Where the text comes from."""
        return self.haystack.path

    @property
    def piece(self) -> tuple[int, int]:
        """Begin and end of what the model reads: all but the last token, which is only a label."""
        return 0, self.length - 1

    @property
    def first_answer(self) -> int:
        """Position whose label is the first token of the value; those up to the end of what is read have the others."""
        return self.length - 1 - self.value_tokens

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of the document, int64; ``document`` is 0."""
        return self._document()[start:stop]

    def _document(self) -> np.ndarray:
        words = self.key_tokens + self.value_tokens
        generator = np.random.default_rng([self.seed, self.length, round(self.depth * 1e6), self.number])
        text_tokens = self.length - 2 * words
        begin = int(generator.integers(len(self.haystack.tokens)))
        text = self.haystack.tokens.take(np.arange(begin, begin + text_tokens), mode="wrap")
        before = round(self.depth * text_tokens)
        for _ in range(_MOST_DRAWS):
            needle = generator.choice(self.haystack.vocabulary, words, replace=False)
            key = needle[: self.key_tokens]
            document = np.concatenate([text[:before], needle, text[before:], needle])
            if np.count_nonzero((np.lib.stride_tricks.sliding_window_view(document, len(key)) == key).all(1)) == 2:
                return document
        raise DataError(f"{self.path}.bin: {_MOST_DRAWS} random keys of {self.key_tokens} tokens all occur in {text_tokens} tokens of text")


def needle_pieces(needles: Sequence[Needle]) -> list[Piece]:
    """What a plan plans: each needle is the only document of the source of its number."""
    return [Piece(number, 0, *needle.piece, has_next=True) for number, needle in enumerate(needles)]
