"""FlexSP: sorted micro-batches, buckets of lengths, and a MILP for each micro-batch (Wang et al. 2025, ASPLOS'25, arXiv:2412.01523)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from megatron_ext.errors import ConfigError
from megatron_ext.planning.cost_model import CostModel
from megatron_ext.planning.peers.flexsp_milp import Solved, solve_groups
from megatron_ext.planning.peers.layout import lay_out, longest_first, smallest_degrees
from megatron_ext.planning.plan import Plan


@dataclass(frozen=True)
class FlexSPResult:
    """A plan and what it took to find."""

    plan: Plan
    milps: int
    """Solved, each to its time limit or to optimality."""
    parallel_seconds: float
    """As if every MILP had had a processor of its own, as in the original: everything else and the longest MILP."""


def flexsp(
    lengths: Sequence[int],
    devices: int,
    cost: CostModel,
    *,
    time_limit: float = 5.0,
    tries: int = 5,
    smallest_degree: int = 1,
    buckets: int = 16,
    in_rounds: bool = False,
) -> FlexSPResult:
    """Algorithm 1: numbers of micro-batches from the smallest possible on, the best by predicted seconds.

    Solved by HiGHS in place of SCIP. Groups may leave ranks idle, as in the paper (equation 8); the released code demands that they do not.
    Where no number of micro-batches tried has a plan, larger ones are tried.

    Args:
        lengths: tokens of each document of the step.
        devices: number of data ranks.
        cost: of packs; FlexSP's own model is one of its kind.
        time_limit: seconds for each MILP.
        tries: numbers of micro-batches that are tried (M' in the paper).
        smallest_degree: of groups; the released code skips 1.
        buckets: Q, lengths that a MILP tells apart.
        in_rounds: of the plan; a micro-batch is a round. Where it is not, ranks without documents in a micro-batch go on to the next.

    Raises:
        ConfigError: a document does not fit on all ranks, or no degree is left.
    """
    begin = time.perf_counter()
    degrees = [degree for degree in cost.degrees(devices) if degree >= smallest_degree]
    if not degrees:
        raise ConfigError(f"smallest_degree: {smallest_degree}; accepted: at most {cost.degrees(devices)[-1]}")
    smallest_degrees(lengths, degrees, cost)
    fewest = max(1, -(-sum(lengths) // (cost.tokens_per_rank * devices)))
    solve = partial(solve_groups, lengths=lengths, devices=devices, cost=cost, degrees=degrees, buckets=buckets, time_limit=time_limit)
    best, solve_seconds = fastest(lengths, fewest, tries, solve)
    plan = lay_out([each.groups for each in best], lengths, devices, cost, in_rounds)
    seconds = time.perf_counter() - begin
    return FlexSPResult(plan, len(solve_seconds), seconds - sum(solve_seconds) + max(solve_seconds, default=0.0))


def fastest(
    lengths: Sequence[int], fewest: int, tries: int, solve: Callable[[list[int]], Solved | None]
) -> tuple[list[Solved], list[float]]:
    """The best micro-batches over ``tries`` numbers of them from ``fewest`` on, or the first that has a plan; and seconds of every MILP."""
    best: list[Solved] = []
    seconds = []
    count = fewest
    while lengths and (count < fewest + tries or not best):
        found = []
        for documents in blaster(lengths, count):
            begin = time.perf_counter()
            found.append(solve(documents))
            seconds.append(time.perf_counter() - begin)
        solved = [each for each in found if each is not None]
        if len(solved) == len(found) and (not best or total(solved) < total(best)):
            best = solved
        count += 1
    return best, seconds


def total(micro_batches: Sequence[Solved]) -> float:
    """Seconds of micro-batches one after another."""
    return sum(each.seconds for each in micro_batches)


def blaster(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Cut the documents, sorted by length, into at most ``count`` runs whose largest number of tokens is least (section 4.2).

    Dynamic programming over DP[k][i] = min over j of max(DP[j][i - 1], tokens of j to k).
    """
    order = longest_first(lengths)
    sums = np.concatenate([[0], np.cumsum([lengths[document] for document in order])])
    run = np.where(np.tri(len(sums), dtype=bool), sums[:, None] - sums[None, :], np.iinfo(np.int64).max)
    most, cuts = run[:, 0], []
    for _ in range(count - 1):
        table = np.maximum(most[None, :], run)
        cuts.append(table.argmin(axis=1))
        most = table.min(axis=1)
    runs, end = [], len(order)
    for cut in [*reversed(cuts), np.zeros(len(sums), dtype=int)]:
        runs.append(order[cut[end] : end])
        end = int(cut[end])
    return [each for each in reversed(runs) if each]


def bucket_limits(lengths: NDArray[np.integer], count: int) -> NDArray[np.integer]:
    """At most ``count`` upper limits of buckets whose sum of (limit - length) is least (section 4.1.3).

    Args:
        lengths: of documents, ascending.
        count: of buckets, Q.

    Returns:
        The limits, ascending; each is a length. Dynamic programming over err[k][q] = min over j of err[j][q - 1] + the error of j to k.
    """
    values, copies = np.unique(lengths, return_counts=True)
    number, total = np.concatenate([[0], np.cumsum(copies)]), np.concatenate([[0], np.cumsum(values * copies)])
    top = np.concatenate([[0], values])
    # error[k, j]: of one bucket for values j to k (exclusive).
    error = (number[:, None] - number[None, :]) * top[:, None] - (total[:, None] - total[None, :])
    error = np.where(np.tri(len(number), dtype=bool), error, np.iinfo(np.int64).max // 4)
    least, cuts = error[:, 0], []
    for _ in range(count - 1):
        table = least[None, :] + error
        cuts.append(table.argmin(axis=1))
        least = table.min(axis=1)
    limits, end = [], len(values)
    for cut in [*reversed(cuts), np.zeros(len(number), dtype=int)]:
        if end:
            limits.append(values[end - 1])
            end = int(cut[end])
    return np.array(limits[::-1])
