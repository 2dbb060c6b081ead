"""Seconds that no plan of a step can go below.

Every bound relaxes the step, and never approximates it: documents may be divided, and exchanges take the least seconds a token that any
pack of their degree would need.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from megatron_ext.errors import ConfigError
from megatron_ext.planning.cost_model import Array, CostModel
from megatron_ext.planning.plan import IntArray
from megatron_ext.planning.step import Step

BISECTIONS = 40


@dataclass(frozen=True)
class DocumentTimes:
    """What each document takes at each degree at least, without what packs cost besides; infinite where it does not fit memory."""

    own: Array
    """Seconds of the document alone in a pack, [documents, degrees]."""
    device: Array
    """Seconds times ranks, with the least exchange of a token, [documents, degrees]."""

    @classmethod
    def of(cls, step: Step) -> "DocumentTimes":
        """The times of a step's documents."""
        table, tokens = step.exchange, step.lengths.astype(np.float64)
        own, device = np.full((2, len(tokens), len(step.degrees)), np.inf)
        for row, degree in enumerate(step.degrees):
            fits = step.lengths <= step.cost.capacity(degree)
            own[fits, row] = step.work[fits] / degree + table.at_least(row, tokens[fits])
            device[fits, row] = step.work[fits] + degree * table.least_rate(row) * tokens[fits]
        return cls(own, device)


def lower_bound(
    lengths: Sequence[int],
    devices: int,
    cost: CostModel,
    *,
    largest_degree: int | None = None,
    in_rounds: bool = False,
    method: str = "area",
) -> float:
    """Seconds, without ``cost.per_step``, that every plan of whole documents takes at least.

    ``area``: what the documents take of the ranks' time, each at the degree that takes least of it among those at which the document
    alone is done in time; and packs, which hold so many tokens and cost so much each, are computed whole.

    Args:
        lengths: tokens of each document.
        devices: number of data ranks.
        cost: what packs cost.
        largest_degree: most ranks of a block; None: as ``CostModel.degrees``.
        in_rounds: ranks wait for each other between packs: the sum of the longest pack of every round.
        method: ``area``, which takes milliseconds, or ``lp``, which takes seconds and is at least as high: see ``configuration_bound``.

    Raises:
        ConfigError: a document that fits no block, or another method.
    """
    if method not in ("area", "lp"):
        raise ConfigError(f"method of the bound is {method!r}; accepted: area, lp")
    step = Step.of(lengths, devices, cost, largest_degree, in_rounds)
    step.require_room()
    if method == "area":
        return area_bound(step)
    from megatron_ext.planning.configuration_lp import configuration_bound

    return configuration_bound(step, area_bound(step))


def fewest_rounds(step: Step) -> int:
    """Rounds that the tokens of a step need at least."""
    return ceil(int(step.lengths.sum()) / (step.devices * step.cost.tokens_per_rank))


def area_bound(step: Step) -> float:
    """As :func:`lower_bound`, of a step whose documents fit."""
    if not step.lengths.any():
        return 0.0
    times = DocumentTimes.of(step)
    return least_feasible(*_area_problem(step, times))


def _area_problem(step: Step, times: DocumentTimes) -> tuple[Callable[[float], bool], float]:
    """Whether documents can be done within some seconds, as far as this bound can tell; and seconds below which they cannot."""
    per_pack, lengths, capacity = step.cost.per_pack, step.lengths, step.cost.tokens_per_rank
    share = float(lengths.sum()) / step.devices
    rounds = fewest_rounds(step) if step.in_rounds else 1
    freest = times.device.min(axis=1)
    # Beside the longest pack of the round of a document, the other rounds compute what that round cannot hold.
    spilled = _least_work(lengths, freest, (share - capacity) * step.devices) / step.devices if step.in_rounds else 0.0
    besides = rounds * per_pack + spilled
    floor = max(rounds * per_pack + float(freest.sum()) / step.devices, besides + float(times.own.min(axis=1).max()))
    # Documents that may use their best degree within the floor may use it within any more seconds.
    best = times.own[np.arange(len(freest)), times.device.argmin(axis=1)]
    tight = best > floor - besides
    fixed, own, device = float(freest[~tight].sum()), times.own[tight], times.device[tight]
    density = float((freest[lengths > 0] / lengths[lengths > 0]).min())

    def feasible(seconds: float) -> bool:
        used = fixed + float(np.where(own <= seconds - besides, device, np.inf).min(axis=1).sum())
        packs = rounds if step.in_rounds else _fewest_packs(share, seconds, capacity, per_pack, density)
        return packs * per_pack + used / step.devices <= seconds

    return feasible, floor


def _least_work(lengths: IntArray, work: Array, tokens: float) -> float:
    """Least work of ``tokens`` tokens taken from documents, parts of documents among them."""
    if tokens <= 0:
        return 0.0
    some = lengths > 0
    order = np.argsort(work[some] / lengths[some], kind="stable")
    held, spent = (np.concatenate([[0.0], np.cumsum(each[some][order])]) for each in (lengths, work))
    return float(np.interp(tokens, held, spent))


def _fewest_packs(share: float, seconds: float, capacity: int, per_pack: float, density: float) -> float:
    """Fewest packs a rank, on average, when ranks compute ``share`` tokens on average within ``seconds``; infinite if they cannot.

    A rank that computes k packs has at most k times the capacity, and at most (seconds - k per_pack) / density. Averages over ranks lie
    in the convex hull of these points.
    """
    pack_seconds = capacity * density + per_pack
    full = int(min(seconds * (1 + 1e-12) / pack_seconds, share + 1)) if pack_seconds > 0 else int(share) + 1
    if share <= full * capacity:
        return max(1.0, share / capacity)
    most = min(capacity * (full + 1.0), (seconds - (full + 1) * per_pack) / density) if density > 0 else capacity * (full + 1.0)
    if share > most * (1 + 1e-12):
        return np.inf
    return max(1.0, full + (share - full * capacity) / (most - full * capacity))


def least_feasible(feasible: Callable[[float], bool], floor: float) -> float:
    """Seconds just below which nothing is feasible, given seconds ``floor`` below which nothing is."""
    if feasible(floor):
        return floor
    low, high = floor, 2.0 * floor
    while not feasible(high):
        low, high = high, 2.0 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if feasible(middle) else (middle, high)
    return low
