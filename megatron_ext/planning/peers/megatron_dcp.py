"""Megatron-LM's dynamic context parallelism: its packing-aware heuristic (branch dev, 2026; ``next_hdp_group_packing_aware``)."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.planning.cost_model import CostModel
from megatron_ext.planning.peers.layout import Group, lay_out, longest_first, smallest_degrees
from megatron_ext.planning.plan import Plan

SLACK = 0.05
"""A rank may have this much more than the work of a full pack of the longest document's length."""


@dataclass
class LoadedGroup(Group):
    """A group with what the heuristic counts of it."""

    load: float = 0.0
    """Sum of squared lengths over the degree."""
    tokens: float = 0.0
    """Of each rank."""

    def add(self, document: int, length: int) -> None:
        self.documents.append(document)
        self.load += length * length / self.degree
        self.tokens += length / self.degree


def megatron_dcp(lengths: Sequence[int], devices: int, cost: CostModel, *, in_rounds: bool = False) -> Plan:
    """Micro-batches formed one after another, each document on the degree that raises the largest load of a rank least.

    Load is length squared over degree: the linear work and exchanges are not looked at, as in the original. Simplified: where the number of
    ranks is no power of two and doubling groups does not fill it, ranks stay idle instead of all working as one group.

    Args:
        lengths: tokens of each document of the step.
        devices: number of data ranks.
        cost: only its capacity is used, and how far heads divide.
        in_rounds: of the plan. Where it is not, ranks without documents in a micro-batch go on to the next, which favours Megatron-LM.

    Raises:
        ConfigError: a document does not fit on all ranks.
    """
    degrees = cost.degrees(devices)
    smallest = smallest_degrees(lengths, degrees, cost)
    left = longest_first(lengths)
    micro_batches = []
    while left:
        groups, left = next_micro_batch(left, lengths, smallest, degrees, devices, cost.tokens_per_rank)
        fill_idle_ranks(groups, degrees, devices)
        micro_batches.append(groups)
    return lay_out(micro_batches, lengths, devices, cost, in_rounds)


def next_micro_batch(
    documents: Sequence[int], lengths: Sequence[int], smallest: Sequence[int], degrees: Sequence[int], devices: int, capacity: int
) -> tuple[list[LoadedGroup], list[int]]:
    """Groups of one micro-batch, and the documents, longest first, that are left for the next. The first has as few ranks as hold it."""
    cap = lengths[documents[0]] * capacity * (1.0 + SLACK)
    first = LoadedGroup(smallest[documents[0]])
    first.add(documents[0], lengths[documents[0]])
    groups, left = [first], []
    free, highest = devices - first.degree, first.load
    for document in documents[1:]:
        length = lengths[document]
        best: tuple[float, LoadedGroup, bool] | None = None
        for degree in degrees:
            if degree < smallest[document]:
                continue
            more = length * length / degree
            candidates = [(group, False) for group in groups if group.degree == degree and group.tokens + length / degree <= capacity]
            if free >= degree:
                candidates.append((LoadedGroup(degree), True))
            for group, is_new in candidates:
                projected = max(highest, group.load + more)
                if projected <= cap and (best is None or projected < best[0]):
                    best = (projected, group, is_new)
        if best is None:
            left.append(document)
            continue
        _, group, is_new = best
        group.add(document, length)
        highest = max(highest, group.load)
        if is_new:
            groups.append(group)
            free -= group.degree
    return groups, left


def fill_idle_ranks(groups: list[LoadedGroup], degrees: Sequence[int], devices: int) -> None:
    """Double the first of the smallest groups while ranks are idle and enough of them."""
    free = devices - sum(group.degree for group in groups)
    while free:
        group = min(groups, key=lambda group: group.degree)
        if group.degree > free or 2 * group.degree > degrees[-1]:
            return
        free -= group.degree
        group.degree *= 2
