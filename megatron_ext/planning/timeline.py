"""When each pack of a plan begins and ends, given how long each takes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.planning.cost_model import Array, CostModel
from megatron_ext.planning.plan import Plan


@dataclass(frozen=True)
class Timeline:
    """Seconds from the begin of a step, by number of pack."""

    begin: Array
    end: Array
    seconds: float
    """Of the whole step, with what a step costs besides."""


def pack_seconds(plan: Plan, cost: CostModel) -> Array:
    """Predicted seconds of each pack of a plan. A slice is a context of its own."""
    seconds = np.zeros(len(plan.packs))
    for number, pack in enumerate(plan.packs):
        work, tokens = cost.work(np.array([len(part) for part in pack.slices])).sum(), pack.tokens
        seconds[number] = float(cost.pack_seconds(float(work), tokens, pack.degree)) if tokens else 0.0
    return seconds


def timeline(plan: Plan, seconds: Sequence[float] | Array, per_step: float = 0.0) -> Timeline:
    """Begin and end of each pack.

    A rank begins its next pack when it and all ranks that share it are done with what came before; in a plan in rounds
    (``plan.in_rounds``), when every rank is done with the round before.

    Args:
        plan: of the step.
        seconds: what each pack takes.
        per_step: what the step costs besides.
    """
    free = np.zeros(plan.num_ranks)
    begin, end = np.zeros(len(plan.packs)), np.zeros(len(plan.packs))
    planned = 0
    for number, pack in enumerate(plan.packs):
        if plan.in_rounds and planned % plan.num_ranks == 0:
            free[:] = free.max()
        planned += pack.degree
        block = slice(pack.first_rank, pack.first_rank + pack.degree)
        begin[number] = free[block].max()
        end[number] = free[block] = begin[number] + seconds[number]
    return Timeline(begin, end, float(free.max()) + per_step)
