"""A plan of whole documents as arrays: what policies make, and what is cheap to compare, before any Plan is built."""

from dataclasses import dataclass

import numpy as np

from megatron_ext.planning.cost_model import Array
from megatron_ext.planning.plan import IntArray, Plan, encode_arrays, is_whole
from megatron_ext.planning.step import Step


@dataclass(frozen=True)
class Assignment:
    """Which pack each document is in, and where each pack is computed.

    Without rounds, the packs of a rank begin with the largest blocks: all ranks of a block then come to it at the same time, and a rank
    is done after the sum of its packs.
    """

    pack: IntArray
    """Pack of each document, [documents]; packs are numbered in the order of the plan."""
    first_rank: IntArray
    """[packs]"""
    degree: IntArray
    """[packs]"""
    round: IntArray | None = None
    """Round of each pack, ascending, [packs]; None: a plan without rounds."""

    @classmethod
    def sorted(cls, pack: IntArray, first_rank: IntArray, degree: IntArray, round: IntArray | None = None) -> "Assignment":
        """From packs in any order: by round, or by degree with the largest first; otherwise the order is kept."""
        order = np.argsort(-degree if round is None else round, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return cls(place[pack], first_rank[order], degree[order], None if round is None else round[order])

    def pack_seconds(self, step: Step) -> Array:
        """Predicted seconds of each pack, [packs]."""
        work = np.bincount(self.pack, step.work, len(self.degree))
        tokens = np.bincount(self.pack, step.lengths, len(self.degree))
        seconds = np.zeros(len(self.degree))
        for degree in step.degrees:
            chosen = self.degree == degree
            seconds[chosen] = step.cost.pack_seconds(work[chosen], tokens[chosen], degree)
        return np.where(tokens > 0, seconds, 0.0)

    def seconds(self, step: Step) -> float:
        """Predicted seconds until the last rank is done: the makespan or, in rounds, the sum of the longest pack of each round."""
        each = self.pack_seconds(step)
        if self.round is not None:
            longest = np.zeros(int(self.round.max(initial=-1)) + 1)
            np.maximum.at(longest, self.round, each)
            return float(longest.sum())
        free = np.zeros(step.devices)
        for degree in step.degrees:
            chosen = self.degree == degree
            blocks = step.devices // degree
            busy = np.bincount(self.first_rank[chosen] // degree, each[chosen], blocks)
            free[: blocks * degree] += np.repeat(busy, degree)
        return float(free.max())

    def plan(self, step: Step) -> Plan:
        """The validated Plan; inside a pack documents keep the order of the step."""
        heads, slices = self._arrays(step)
        plan = Plan.decode(encode_arrays(step.devices, step.in_rounds, heads, slices))
        if not is_whole(step.devices, step.in_rounds, heads, slices, step.lengths, step.cost.tokens_per_rank):
            plan.validate(step.lengths.tolist(), step.cost.tokens_per_rank)
        return plan

    def _arrays(self, step: Step) -> tuple[IntArray, IntArray]:
        degree, first_rank, pack = self.degree, self.first_rank, self.pack
        if step.in_rounds:
            degree, first_rank, pack = self._with_idle_ranks(step.devices)
        rings = np.ones(int(max(step.degrees)).bit_length(), dtype=np.int64)
        for place, each in enumerate(step.degrees):
            rings[place] = step.cost.ring_of(each)
        ring = rings[np.log2(degree).astype(np.int64)]
        documents = np.flatnonzero(step.lengths)
        order = documents[np.argsort(pack[documents], kind="stable")]
        slices = np.stack([order, np.zeros_like(order), step.lengths[order]], axis=1)
        count = np.bincount(pack[documents], minlength=len(degree))
        return np.stack([first_rank, degree, ring, count], axis=1), slices

    def _with_idle_ranks(self, devices: int) -> tuple[IntArray, IntArray, IntArray]:
        """Degree, first rank and pack of each document, with packs of no tokens where a rank has nothing to do in a round."""
        assert self.round is not None, "a plan in rounds has rounds"
        rounds = max(1, int(self.round.max(initial=-1)) + 1)
        place = self.round * devices + self.first_rank
        edges = np.zeros(rounds * devices + 1, dtype=np.int64)
        np.add.at(edges, place, 1)
        np.add.at(edges, place + self.degree, -1)
        idle = np.flatnonzero(np.cumsum(edges)[:-1] == 0)
        places, degree = np.concatenate([place, idle]), np.concatenate([self.degree, np.ones_like(idle)])
        order = np.argsort(places)
        number = np.empty_like(order)
        number[order] = np.arange(len(order))
        return degree[order], places[order] % devices, number[self.pack]
