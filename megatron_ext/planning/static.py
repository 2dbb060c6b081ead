"""Static policies: every pack of a step has the same degree."""

from collections.abc import Callable
from math import ceil

import numpy as np

from megatron_ext.errors import ConfigError
from megatron_ext.planning.assignment import Assignment
from megatron_ext.planning.packing import longest_first, pack_best_fit
from megatron_ext.planning.plan import IntArray
from megatron_ext.planning.step import Step

Packer = Callable[[IntArray, int], tuple[IntArray, int]]
"""Lengths and a capacity in, the pack of each document and the number of packs out."""


SLACKS = (1.02, 1.15)
"""Tokens of a pack, as multiples of an even share, at which documents are packed besides packing them as full as they can be."""


def static(step: Step, degree: int, packer: Packer = pack_best_fit, even: bool = True) -> Assignment:
    """Whole documents in best-fit packs of ``degree`` ranks; packs go, longest first, to the block that is done first.

    In rounds, the packs of a round are those of like seconds: with packs of one size this makes the sum of the longest least.

    Args:
        step: what there is to plan.
        degree: ranks of every block, a power of two.
        packer: best-fit decreasing.
        even: where full packs would leave blocks idle, try as many smaller packs as there are blocks; otherwise what is packed together
            does not depend on the number of devices.

    Raises:
        ConfigError: a degree that is not allowed, or a document that does not fit it.
    """
    if degree not in step.degrees:
        raise ConfigError(f"planning.degree is {degree}; accepted for {step.devices} ranks: {', '.join(map(str, step.degrees))}")
    step.require_room(degree)
    capacity, blocks = step.cost.capacity(degree), step.devices // degree
    pack, packs = packer(step.lengths, capacity)
    full = spread(step, pack, packs, degree)
    if not even or packs % blocks == 0:
        return full
    share = float(step.lengths.sum()) / (blocks * ceil(packs / blocks))
    longest = int(step.lengths.max(initial=0))
    smaller = [packer(step.lengths, min(capacity, max(longest, ceil(slack * share)))) for slack in SLACKS]
    return min([full, *(spread(step, pack, packs, degree) for pack, packs in smaller)], key=lambda each: each.seconds(step))


def spread(step: Step, pack: IntArray, packs: int, degree: int) -> Assignment:
    """Packs of ``degree`` ranks, given the pack of each document, over blocks; the longest packs come first in the list."""
    blocks = step.devices // degree
    degrees = np.full(packs, degree)
    seconds = Assignment(pack, np.zeros(packs, dtype=np.int64), degrees).pack_seconds(step)
    order = np.argsort(-seconds, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(packs)
    if step.in_rounds:
        rounds, block = np.divmod(np.arange(packs), blocks)
        return Assignment(place[pack], block * degree, degrees, rounds)
    return Assignment(place[pack], longest_first(seconds[order], blocks) * degree, degrees)


def best_static(step: Step, packer: Packer = pack_best_fit, below: float = np.inf) -> tuple[Assignment, int] | None:
    """The static assignment of least predicted seconds, and its degree; of equals that of the lowest bound.

    Args:
        step: what there is to plan.
        packer: best-fit decreasing.
        below: only assignments of at most these seconds are of interest: None if there is none.

    Raises:
        ConfigError: a document that fits no block.
    """
    step.require_room()
    longest, best = int(step.lengths.max(initial=0)), None
    floors = [(_static_floor(step, degree), degree) for degree in step.degrees if step.cost.capacity(degree) >= longest]
    for floor, degree in sorted(floors):
        if floor > below:
            break
        candidate = static(step, degree, packer)
        seconds = candidate.seconds(step)
        if seconds < below or (best is None and seconds <= below):
            best, below = (candidate, degree), seconds
    return best


def _static_floor(step: Step, degree: int) -> float:
    """Seconds that no plan of this degree can go below: packs at capacity, shared evenly. A little less, for rounding."""
    blocks, capacity = step.devices // degree, step.cost.capacity(degree)
    packs = float(step.lengths.sum()) / capacity
    rounds = ceil(packs / blocks) if step.in_rounds else packs / blocks
    rate = step.exchange.least_rate(step.degrees.index(degree))
    each = float(step.work.sum()) / degree + rate * float(step.lengths.sum())
    return (rounds * step.cost.per_pack + each / blocks) * (1 - 1e-9)
