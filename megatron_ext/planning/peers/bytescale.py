"""ByteScale: as few ranks for each document as hold it, and packs dealt to ranks by load (Ge et al. 2025, arXiv:2502.21231, section 5)."""

from collections import deque
from collections.abc import Sequence

import numpy as np

from megatron_ext.planning.cost_model import CostModel
from megatron_ext.planning.packing import best_fit_decreasing
from megatron_ext.planning.peers.layout import Group, smallest_degrees, to_pack
from megatron_ext.planning.plan import Plan

SLACK = 0.05
"""Share of the largest load below which a rank counts as one that waits."""


def bytescale(lengths: Sequence[int], devices: int, cost: CostModel, *, buckets: int = 16, in_rounds: bool = False) -> Plan:
    """Algorithm 1, then Algorithm 2 for data parallelism.

    Restricted so that one judge can run all plans: ranks of a document are an aligned block of a power of two, where ByteScale takes any
    D(s) = ceil(s / C). Left out: offloading of activations, balance for pipelines, and its
    remote data loader. Attention divides heads before it forms rings.

    Args:
        lengths: tokens of each document of the step.
        devices: number of data ranks.
        cost: its capacity C of a rank and its work as FLOPs; exchanges are not looked at, as in the original.
        buckets: of equal work, in which packs are dealt out one after another, so that packs that run together are of like work.
        in_rounds: put the packs in rounds, in the order in which they were dealt.

    Raises:
        ConfigError: a document does not fit on all ranks.
    """
    units = minimal_ranks(lengths, devices, cost)
    work = cost.work(lengths)
    weights = [float(work[unit.documents].sum()) for unit in units]
    order = sorted(range(len(units)), key=lambda unit: (-units[unit].degree, -weights[unit] / units[unit].degree))
    queues = equal_buckets(order, weights, buckets)
    load = np.zeros(devices)
    packs = []
    while queues:
        unit = queues[0].popleft()
        while queues and not queues[0]:
            queues.pop(0)
        degree = units[unit].degree
        blocks = load[: devices // degree * degree].reshape(-1, degree).max(axis=1)
        # Any rank that is behind may be next; the one that is behind most is.
        waiting = np.flatnonzero(blocks <= max(load.max() * (1 - SLACK), blocks.min()))
        place = int(waiting[blocks[waiting].argmin()]) * degree
        load[place : place + degree] = load[place : place + degree].max() + weights[unit] / degree
        packs.append(to_pack(place, units[unit], lengths, cost))
    plan = Plan(devices, tuple(packs))
    return plan.by_rounds(at_least=1) if in_rounds else plan


def minimal_ranks(lengths: Sequence[int], devices: int, cost: CostModel) -> list[Group]:
    """Algorithm 1: a document that one rank does not hold is alone on the fewest that do; the others are packed best-fit, for one rank."""
    degrees = smallest_degrees(lengths, cost.degrees(devices), cost)
    alone = [Group(degree, [document]) for document, degree in enumerate(degrees) if degree > 1]
    short = [document for document, degree in enumerate(degrees) if degree == 1]
    packs = best_fit_decreasing([lengths[document] for document in short], cost.capacity(1))
    return alone + [Group(1, [short[place] for place in pack]) for pack in packs]


def equal_buckets(order: Sequence[int], weights: Sequence[float], count: int) -> list[deque[int]]:
    """Cut ``order`` into at most ``count`` runs of about equal sums of ``weights``."""
    target = sum(weights) / count
    runs: list[deque[int]] = []
    filled = float("inf")
    for unit in order:
        if filled >= target:
            runs.append(deque())
            filled = 0.0
        runs[-1].append(unit)
        filled += weights[unit]
    return runs
