"""The adaptive policy where ranks meet only inside their blocks: the least makespan over documents, packs and degrees together.

Dual approximation (Hochbaum and Shmoys 1987): a greedy planner answers whether all can be done by a target, and the target is searched.
"""

import numpy as np

from megatron_ext.planning.assignment import Assignment
from megatron_ext.planning.bounds import area_bound
from megatron_ext.planning.buddy_kernel import fill_blocks
from megatron_ext.planning.problem import problem_of
from megatron_ext.planning.search import gallop, tries_for
from megatron_ext.planning.step import Step


def plan_borderless(step: Step) -> Assignment:
    """An assignment of the documents of a step without rounds."""
    problem, order = problem_of(step)
    count = len(order)

    def meet(target: float) -> Assignment | None:
        sorted_pack, first_rank, row = np.zeros((3, count), dtype=np.int64)
        packs = fill_blocks(problem, target, sorted_pack, first_rank, row)
        if packs < 0:
            return None
        pack = np.zeros(count, dtype=np.int64)
        pack[order] = sorted_pack
        return Assignment.sorted(pack, first_rank[:packs], np.left_shift(1, row[:packs]))

    found = gallop(meet, area_bound(step), tries_for(count))
    return min(found, key=lambda assignment: assignment.seconds(step))
