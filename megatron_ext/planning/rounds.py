"""The adaptive policy where ranks wait for each other between packs: the least sum, over rounds, of the longest pack.

All rounds are filled at once, each up to a target of its own, so that long documents, which are short of time, and short ones, which
are short of memory, share rounds. Searched: the number of rounds, how their targets relate, and the targets.
"""

from dataclasses import dataclass

import numpy as np

from megatron_ext.planning.assignment import Assignment
from megatron_ext.planning.bounds import area_bound, fewest_rounds
from megatron_ext.planning.cost_model import Array
from megatron_ext.planning.plan import IntArray
from megatron_ext.planning.problem import Problem, problem_of
from megatron_ext.planning.rounds_kernel import fill_rounds
from megatron_ext.planning.search import gallop, tries_for
from megatron_ext.planning.step import Step

RATIOS = (1.15, 1.3, 1.5, 1.75, 2.0, 2.5)
"""Targets of the first round that are tried, as multiples of the others."""


@dataclass(frozen=True)
class Filled:
    """Rounds filled by the greedy planner."""

    longest: Array
    """Seconds of the longest pack of each round, [rounds]."""
    pack: IntArray
    """Pack of each document, longest document first."""
    first_rank: IntArray
    row: IntArray
    round: IntArray

    @property
    def seconds(self) -> float:
        """Of all rounds."""
        return float(self.longest.sum())


def plan_rounds(step: Step) -> Assignment:
    """An assignment of the documents of a step in rounds."""
    problem, order = problem_of(step)
    bound, fewest, tries = area_bound(step), fewest_rounds(step), tries_for(len(order))
    best, rounds = None, fewest
    while best is None or (rounds < fewest + 4 and bound + (rounds - fewest) * step.cost.per_pack < best.seconds):
        found = _fill(problem, np.full(rounds, np.inf))
        if found is not None:
            found = _search(problem, rounds, bound, tries)
            best = found if best is None or found.seconds < best.seconds else best
            tries = max(10, tries // 4)  # more rounds than needed seldom pay
        rounds += 1
    pack = np.zeros(len(order), dtype=np.int64)
    pack[order] = best.pack
    return Assignment.sorted(pack, best.first_rank, np.left_shift(1, best.row), best.round)


def _fill(problem: Problem, targets: Array) -> Filled | None:
    most = min(len(problem.lengths), len(targets) * problem.devices)
    pack, longest = np.zeros(len(problem.lengths), dtype=np.int64), np.zeros(len(targets))
    round_of, first_rank, row = np.zeros((3, most), dtype=np.int64)
    packs = fill_rounds(problem, targets, pack, round_of, first_rank, row, longest)
    return None if packs < 0 else Filled(longest, pack, first_rank[:packs], row[:packs], round_of[:packs])


def _search(problem: Problem, rounds: int, bound: float, tries: int) -> Filled:
    """Equal targets, then those of the shapes that can do with less, then improved round by round."""
    low = max(bound / rounds, float(_seconds_alone(problem).min()))
    equal = gallop(lambda target: _fill(problem, np.full(rounds, target)), low, max(4, tries // 10))
    best = min(equal, key=lambda found: found.seconds)
    for shape, least in _shapes(problem, rounds):
        best = _bisect_shape(problem, shape, least, bound, best, max(3, tries // 12))
    return _tighten(problem, best, tries // 4)


def _bisect_shape(problem: Problem, shape: Array, least: Array, bound: float, best: Filled, tries: int) -> Filled:
    """The best of fillings with targets of one shape; most shapes are done when they fail to do with the seconds of the best."""
    low, high = max(0.0, bound - least.sum()) / shape.sum(), (best.seconds - least.sum()) / shape.sum()
    target = high
    for _ in range(tries):
        if target <= low or (found := _fill(problem, target * shape + least)) is None:
            if target == high:
                break
            low = target
        else:
            best, high = min(best, found, key=lambda each: each.seconds), target
        target = (low + high) / 2
    return best


def _seconds_alone(problem: Problem) -> Array:
    """Seconds of the longest document, alone in a pack, at each degree that it fits, [degrees that it fits]."""
    length, degrees = problem.lengths[0], 2 ** np.arange(len(problem.knots))
    exchanges = np.array([np.interp(length, *row) for row in zip(problem.knots, problem.table, strict=True)])
    return (problem.per_pack + problem.work[0] / degrees + exchanges)[length <= problem.capacity * degrees]


def _shapes(problem: Problem, rounds: int) -> list[tuple[Array, Array]]:
    """How targets of rounds relate, as factors of one number and summands: the first longer; the first as long as the longest needs."""
    if rounds == 1:
        return []
    first = np.eye(rounds)[0]
    longer = [(1 + (ratio - 1) * first, np.zeros(rounds)) for ratio in RATIOS]
    return longer + [(1 - first, seconds * (1 + 1e-9) * first) for seconds in _seconds_alone(problem)]


def _tighten(problem: Problem, best: Filled, tries: int) -> Filled:
    """Lower the target of one round after the other, the longest first, as far as the greedy planner follows."""
    each = max(2, tries // len(best.longest))
    for place in np.argsort(-best.longest, kind="stable")[: max(1, tries // each)]:
        low, high = problem.per_pack, best.longest[place]
        for _ in range(each):
            targets = best.longest.copy()
            targets[place] = (low + high) / 2
            found = _fill(problem, targets)
            if found is not None and found.seconds <= best.seconds:
                best, high = found, min(targets[place], found.longest[place])
            else:
                low = targets[place]
    return best
