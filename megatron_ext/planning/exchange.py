"""Exchanges of every degree as straight lines between knots: what compiled planners read and bounds reason about."""

from dataclasses import dataclass

import numpy as np

from megatron_ext.planning.cost_model import Array, CostModel, Curve


@dataclass(frozen=True)
class ExchangeTable:
    """Seconds that a pack spends in exchanges by its tokens, exact from one token to the capacity; row p is of degree 2**p."""

    tokens: Array
    """Knots, ascending, from 1 to the capacity and repeated to fill the row, [degrees, knots]."""
    seconds: Array
    """At the knots, [degrees, knots]."""

    @classmethod
    def of(cls, cost: CostModel, degrees: tuple[int, ...]) -> "ExchangeTable":
        """The table of a cost model."""
        rows = [_knots(cost, degree) for degree in degrees]
        width = max(len(row) for row in rows)
        tokens = np.array([np.pad(row, (0, width - len(row)), mode="edge") for row in rows])
        return cls(tokens, np.array([cost.exchange_seconds(row, degree) for row, degree in zip(tokens, degrees, strict=True)]))

    def least_rate(self, row: int) -> float:
        """Fewest seconds a token of any pack of this degree. Between knots the rate is monotone, so one of them has the least."""
        return float((self.seconds[row] / self.tokens[row]).min())

    def least_slopes(self) -> Array:
        """Fewest seconds, not below 0, that a token more adds to a pack of each degree that has some, [degrees]."""
        widths = np.diff(self.tokens, axis=1)
        slopes = np.divide(np.diff(self.seconds, axis=1), widths, out=np.full(widths.shape, np.inf), where=widths > 0)
        least = slopes.min(axis=1, initial=np.inf)
        return np.maximum(0.0, np.where(np.isfinite(least), least, 0.0))

    def at_least(self, row: int, tokens: Array) -> Array:
        """Fewest seconds of any pack of this degree that has ``tokens`` tokens or more."""
        knots, later = self.tokens[row], np.minimum.accumulate(self.seconds[row][::-1])[::-1]
        following = later[np.minimum(np.searchsorted(knots, tokens), len(knots) - 1)]
        return np.minimum(np.interp(tokens, knots, self.seconds[row]), following)


def _knots(cost: CostModel, degree: int) -> Array:
    """Tokens, from 1 to the capacity, at which the slope of the seconds may change."""
    capacity = float(cost.capacity(degree))
    sent = [*zip(_curves(cost, degree), _bytes_a_token(cost, degree), strict=True)] if degree > 1 else []
    kinks = [kink / rate for curve, rate in sent if rate > 0 for kink in _kinks(curve)]
    return np.unique([1.0, capacity, *(kink for kink in kinks if 1.0 < kink < capacity)])


def _curves(cost: CostModel, degree: int) -> list[Curve]:
    ranks, heads = degree // cost.ring_of(degree), Curve()
    if ranks > 1 and cost.all_to_all:
        heads = cost.all_to_all[min(len(cost.all_to_all), ranks.bit_length() - 1) - 1]
    return [heads, heads, cost.ring_step, cost.ring_step]


def _bytes_a_token(cost: CostModel, degree: int) -> list[float]:
    return [float(sent) for sent in (*cost.all_to_all_bytes(1.0, degree), *cost.ring_step_bytes(1.0, degree))]


def _kinks(curve: Curve) -> list[float]:
    """Bytes where the slope of a curve changes, among them where it leaves or reaches zero."""
    if len(curve.bytes) < 2:
        return []
    x, y = np.array(curve.bytes), np.array(curve.seconds)
    slopes = np.diff(y) / np.diff(x)
    crossings = [float(x[at] - y[at] / slope) for at, slope in ((0, slopes[0]), (-1, slopes[-1])) if slope]
    return [float(point) for point in x[1:-1]] + crossings + [float(point) for at in (slice(0, 1), slice(-1, None)) for point in x[at]]
