"""How the shares of lengths change within a cycle of training (Pouransari et al. 2024, arXiv:2405.13226)."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

Curriculum = Literal["natural", "uniform", "grow_linear", "grow_p2", "grow_p100", "shrink_p100"]


def odds(curriculum: Curriculum, shares: Sequence[float]) -> tuple[float, ...]:
    """Odds of the buckets to be drawn from while they last, from the shortest pieces to the longest.

    Args:
        curriculum: ``natural``: in proportion to ``shares``, so that nothing changes within a cycle; ``uniform``: alike; ``grow_linear``:
            k, k - 1 ... 1 for k buckets; ``grow_p2``: falling by factors of 2; ``grow_p100``: of 100; ``shrink_p100``: rising so.
        shares: of the tokens that the buckets have.
    """
    places = range(len(shares))
    match curriculum:
        case "natural":
            return tuple(shares)
        case "uniform":
            return tuple(1.0 for _ in places)
        case "grow_linear":
            return tuple(float(len(shares) - place) for place in places)
        case "grow_p2":
            return tuple(2.0**-place for place in places)
        case "grow_p100":
            return tuple(100.0**-place for place in places)
        case "shrink_p100":
            return tuple(100.0 ** (place + 1 - len(shares)) for place in places)


@dataclass(frozen=True)
class CycleShares:
    """Shares that repeat: in each cycle every bucket is owed its share of the tokens, by the odds of those that are not used up."""

    shares: tuple[float, ...]
    """Of each bucket in a whole cycle; they sum to 1."""
    odds: tuple[float, ...]
    cycle_tokens: int

    @cached_property
    def _corners(self) -> tuple[list[float], np.ndarray]:
        """Where a bucket is used up, in tokens of the cycle, and what each bucket was owed until there: both linear in between."""
        left = np.array(self.shares) * self.cycle_tokens
        whole, rates = left.copy(), np.array(self.odds)
        times, owed = [0.0], [np.zeros_like(left)]
        active = left > 0
        while active.any():
            speed = np.where(active, rates, 0.0) / rates[active].sum()
            lasts = np.where(active, left / np.where(active, speed, 1.0), np.inf)
            first = int(lasts.argmin())
            left = np.where(active, left - speed * lasts[first], 0.0)
            active[first] = False
            left = np.where(active, np.maximum(left, 0.0), 0.0)
            times.append(times[-1] + float(lasts[first]))
            owed.append(whole - left)
        times[-1] = float(self.cycle_tokens)
        return times, np.array(owed)

    def amount(self, source: int, begin: float, end: float) -> float:
        """As in ``Shares``."""
        return self._until(source, end) - self._until(source, begin)

    def _until(self, source: int, end: float) -> float:
        times, owed = self._corners
        cycles, inside = divmod(end, self.cycle_tokens)
        return cycles * float(owed[-1, source]) + float(np.interp(inside, times, owed[:, source]))

    def span(self, source: int, begin: int, tokens: int, length: int) -> tuple[float, float]:
        """As in ``Shares``."""
        before = self._until(source, begin)
        return self._reached(source, before + tokens) - begin, self._reached(source, before + tokens + length) - begin

    def _reached(self, source: int, tokens: float) -> float:
        """Tokens of the run at which so many are owed to a bucket, which has some in every cycle."""
        times, owed = self._corners
        column = owed[:, source]
        cycles, inside = divmod(tokens, float(column[-1]))
        at = bisect_left(column, inside)
        if at == 0:
            return cycles * self.cycle_tokens
        part = (inside - column[at - 1]) / (column[at] - column[at - 1])
        return cycles * self.cycle_tokens + times[at - 1] + float(part) * (times[at] - times[at - 1])
