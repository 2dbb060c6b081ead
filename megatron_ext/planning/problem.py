"""A step as compiled planners read it."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_ext.planning.step import Step

Array = NDArray[np.float64]


class Problem(NamedTuple):
    """Documents in descending order of length, and coefficients."""

    lengths: Array
    """Tokens, descending, [documents]."""
    work: Array
    """Seconds on one rank, [documents]."""
    devices: int
    capacity: float
    """Tokens of one rank."""
    per_pack: float
    knots: Array
    """Of the ExchangeTable, in tokens, [degrees, knots]."""
    table: Array
    """Its seconds, [degrees, knots]."""
    rates: Array
    """Fewest seconds that a token more, of any document, adds to a pack that is not empty, [degrees]."""


def problem_of(step: Step) -> tuple[Problem, NDArray[np.int64]]:
    """The problem of a step, and the number of each of its documents in the step. Documents of equal length keep their order."""
    order = np.argsort(-step.lengths, kind="stable")
    table, lengths, work = step.exchange, step.lengths[order].astype(np.float64), step.work[order]
    capacity, per_pack = float(step.cost.tokens_per_rank), float(step.cost.per_pack)
    present = lengths > 0
    least = float((work[present] / lengths[present]).min()) if present.any() else 0.0
    rates = least / np.array(step.degrees) + table.least_slopes()
    return Problem(lengths, work, step.devices, capacity, per_pack, table.tokens, table.seconds, rates), order
