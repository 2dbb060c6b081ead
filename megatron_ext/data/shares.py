"""Shares of the tokens of a run as functions of tokens, and whose turn it is by their integrals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


class Shares(Protocol):
    """The share of the tokens that each source has at every point of a run; together they are 1."""

    def amount(self, source: int, begin: float, end: float) -> float:
        """Tokens that a source is owed of those from ``begin`` to ``end``: the integral of its share."""

    def span(self, source: int, begin: int, tokens: int, length: int) -> tuple[float, float]:
        """When a piece is due: tokens of the whole mixture after ``begin`` at which ``tokens`` of the source are owed, and ``length`` more.

        Infinite where the share never amounts to that.
        """


@dataclass(frozen=True)
class ConstantShares:
    """Shares that do not change; one of 0 leaves a source out."""

    shares: tuple[float, ...]

    @classmethod
    def of(cls, weights: Sequence[float]) -> "ConstantShares":
        """Shares in proportion to weights."""
        total = sum(weights)
        return cls(tuple(weight / total for weight in weights))

    def amount(self, source: int, begin: float, end: float) -> float:
        """As in ``Shares``."""
        return self.shares[source] * (end - begin)

    def span(self, source: int, begin: int, tokens: int, length: int) -> tuple[float, float]:
        """As in ``Shares``."""
        share = self.shares[source]
        if share == 0.0:
            return math.inf, math.inf
        start = tokens / share
        return start, start + length / share


@dataclass(frozen=True)
class Fade:
    """A value that goes from ``first`` to ``last`` within the first ``tokens`` tokens of a run and stays there."""

    first: float
    last: float
    tokens: int
    shape: Literal["linear", "cosine"]

    def integral(self, end: float) -> float:
        """Of the value from the begin of the run to ``end`` tokens."""
        inside, beyond = min(end, self.tokens), max(0.0, end - self.tokens)
        if self.shape == "linear":
            area = self.first * inside + (self.last - self.first) * inside * inside / (2 * self.tokens)
        else:
            wave = inside + self.tokens / math.pi * math.sin(math.pi * inside / self.tokens)
            area = self.last * inside + (self.first - self.last) / 2 * wave
        return area + self.last * beyond


@dataclass(frozen=True)
class FadingShares:
    """Shares between two mixtures: ``fade`` of ``second``, the rest of ``first``. Both give each source's share and sum to 1."""

    first: tuple[float, ...]
    second: tuple[float, ...]
    fade: Fade

    def amount(self, source: int, begin: float, end: float) -> float:
        """As in ``Shares``."""
        of_second = self.fade.integral(end) - self.fade.integral(begin)
        return self.first[source] * ((end - begin) - of_second) + self.second[source] * of_second

    def span(self, source: int, begin: int, tokens: int, length: int) -> tuple[float, float]:
        """As in ``Shares``."""
        return self._reached(source, begin, tokens), self._reached(source, begin, tokens + length)

    def _reached(self, source: int, begin: int, tokens: int) -> float:
        """Tokens after ``begin`` at which ``tokens`` of the source are owed."""
        if tokens == 0:
            return 0.0
        settled = max(begin, self.fade.tokens)
        before = self.amount(source, begin, settled)
        if before < tokens:
            share = self.first[source] * (1.0 - self.fade.last) + self.second[source] * self.fade.last
            return settled - begin + (tokens - before) / share if share > 0.0 else math.inf
        low, high = float(begin), float(settled)
        # The integral rises, so halving finds the place to the last bit that a float has for it.
        while low < (middle := (low + high) / 2) < high:
            low, high = (middle, high) if self.amount(source, begin, middle) < tokens else (low, middle)
        return high - begin


class Turns:
    """Whose turn it is.

    Of the sources that are not ahead of their share, it is that of the one whose next piece is due first (Bennett and Zhang 1996,
    "WF2Q: Worst-case Fair Weighted Fair Queueing"). So the tokens of every source are the integral of its share at every point to within
    one piece, also where shares change: due times are then those of a queue that serves all sources at once.

    Args:
        shares: of the sources.
        begin: tokens of the run at which counting begins.
    """

    def __init__(self, shares: Shares, begin: int) -> None:
        self._shares, self._begin = shares, begin
        self._spans: dict[int, tuple[float, float]] = {}

    def offer(self, source: int, tokens: int, length: int) -> None:
        """The next piece of a source that ``tokens`` were taken of since ``begin`` is of ``length`` tokens."""
        self._spans[source] = self._shares.span(source, self._begin, tokens, length)

    def next(self, total: int) -> int:
        """The source whose turn it is after ``total`` tokens of all of them."""
        # Rounding could put every source ahead by an ulp; the one that is least ahead is always due.
        now = max(total, min(start for start, _ in self._spans.values()))
        return min(
            (source for source, (start, _) in self._spans.items() if start <= now), key=lambda source: (self._spans[source][1], source)
        )
