"""The MILP of FlexSP for one micro-batch (Wang et al. 2025, arXiv:2412.01523, section 4.1), solved by HiGHS."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_ext.planning.cost_model import Array, CostModel
from megatron_ext.planning.peers.layout import Group, longest_first


@dataclass(frozen=True)
class Solved:
    """Groups of one micro-batch and the predicted seconds of the slowest."""

    seconds: float
    groups: list[Group]


@dataclass(frozen=True)
class Problem:
    """Virtual groups and buckets. Columns of the MILP: counts by group and bucket, then whether each group is used, then its makespan."""

    degrees: NDArray[np.int64]
    """Of every virtual group: one for each place of each degree."""
    limits: NDArray[np.int64]
    """Tokens of a document of each bucket."""
    counts: NDArray[np.int64]
    """Documents of each bucket."""
    seconds: Array
    """[groups, buckets]: of a document on a group."""
    fixed: float
    devices: int
    tokens_per_rank: int


def solve_groups(
    documents: Sequence[int],
    lengths: Sequence[int],
    devices: int,
    cost: CostModel,
    degrees: Sequence[int],
    buckets: int,
    time_limit: float,
) -> Solved | None:
    """Groups for the documents of one micro-batch, or None where none was found.

    The search begins with the best balanced plan of a single degree, and the result is never worse than it.
    """
    from megatron_ext.planning.peers.flexsp import bucket_limits

    start = homogeneous(documents, lengths, devices, cost, degrees)
    ascending = sorted(documents, key=lambda document: lengths[document])
    tokens = np.array([lengths[document] for document in ascending])
    limits = bucket_limits(tokens, buckets)
    bucket = np.searchsorted(limits, tokens)
    groups = np.array([degree for degree in degrees for _ in range(devices // degree)])
    each = np.stack([cost.work(limits) / degree + cost.exchange_seconds(limits, int(degree)) for degree in groups])
    counts = np.bincount(bucket, minlength=len(limits))
    problem = Problem(groups, limits, counts, each, cost.per_pack, devices, cost.tokens_per_rank)
    found = search(problem, warm_start(problem, start, ascending, bucket) if start else None, time_limit)
    if found is None:
        return start
    result = hand_out(found, problem, ascending, bucket)
    solved = Solved(makespan(result, lengths, cost), result)
    return start if start is not None and start.seconds <= solved.seconds else solved


def homogeneous(documents: Sequence[int], lengths: Sequence[int], devices: int, cost: CostModel, degrees: Sequence[int]) -> Solved | None:
    """The best plan with groups of a single degree: documents, longest first, to the group with room that has least work."""
    best = None
    order = [documents[place] for place in longest_first([lengths[document] for document in documents])]
    work = dict(zip(order, cost.work([lengths[document] for document in order]).tolist(), strict=True))
    for degree in degrees:
        groups = [Group(degree) for _ in range(devices // degree)]
        load, room = [0.0] * len(groups), [cost.capacity(degree)] * len(groups)
        for document in order:
            fitting = [group for group in range(len(groups)) if room[group] >= lengths[document]]
            if not fitting:
                break
            place = min(fitting, key=load.__getitem__)
            groups[place].documents.append(document)
            load[place] += work[document]
            room[place] -= lengths[document]
        else:
            seconds = makespan(groups, lengths, cost)
            if best is None or seconds < best.seconds:
                best = Solved(seconds, groups)
    return best


def makespan(groups: Sequence[Group], lengths: Sequence[int], cost: CostModel) -> float:
    """Predicted seconds of the slowest group."""
    slowest = 0.0
    for group in groups:
        tokens = [lengths[document] for document in group.documents]
        if tokens:
            slowest = max(slowest, float(cost.pack_seconds(float(cost.work(tokens).sum()), sum(tokens), group.degree)))
    return slowest


def warm_start(problem: Problem, start: Solved, documents: Sequence[int], bucket: NDArray[np.int64]) -> Array | None:
    """``start`` as values of the columns; None where it does not fit once lengths are rounded up to the limits of their buckets."""
    values = np.zeros_like(problem.seconds)
    bucket_of = dict(zip(documents, bucket.tolist(), strict=True))
    used = [group for group in start.groups if group.documents]
    places = np.flatnonzero(problem.degrees == used[0].degree)
    for place, group in zip(places.tolist(), used, strict=False):
        for document in group.documents:
            values[place, bucket_of[document]] += 1
    if (values @ problem.limits > problem.tokens_per_rank * problem.degrees).any():
        return None
    seconds = float((values * problem.seconds).sum(axis=1).max()) + problem.fixed
    return np.concatenate([values.ravel(), values.any(axis=1), [seconds]])


def search(problem: Problem, start: Array | None, time_limit: float) -> NDArray[np.int64] | None:
    """Counts [groups, buckets] of the best solution found, or None."""
    import highspy

    groups, buckets = problem.seconds.shape
    solver = highspy.Highs()
    for option, value in (("output_flag", False), ("threads", 1), ("random_seed", 0), ("time_limit", float(time_limit))):
        solver.setOptionValue(option, value)
    solver.passModel(milp(problem))
    if start is not None:
        solution = highspy.HighsSolution()
        solution.col_value = start.tolist()
        solver.setSolution(solution)
    solver.run()
    if solver.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return None
    values = np.array(solver.getSolution().col_value[: groups * buckets])
    return np.rint(values).astype(np.int64).reshape(groups, buckets)


def milp(problem: Problem) -> object:
    """Minimize the makespan C, subject to equations 6 to 14 with counts by bucket.

    Rows: for each group, its seconds at most C; its tokens at most what it holds; documents only where it is used; then every document of
    a bucket once; then ranks of used groups at most those there are.
    """
    import highspy

    groups, buckets = problem.seconds.shape
    cells, infinity = groups * buckets, highspy.kHighsInf
    rows = np.zeros((3 * groups + buckets + 1, cells + groups + 1))
    for group in range(groups):
        own = slice(group * buckets, (group + 1) * buckets)
        rows[group, own], rows[group, -1] = problem.seconds[group], -1.0
        rows[groups + group, own] = problem.limits / (problem.tokens_per_rank * problem.degrees[group])
        rows[2 * groups + group, own], rows[2 * groups + group, cells + group] = 1.0, -float(problem.counts.sum())
    for bucket in range(buckets):
        rows[3 * groups + bucket, bucket:cells:buckets] = 1.0
    rows[-1, cells:-1] = problem.degrees
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = rows.shape[1], rows.shape[0]
    model.col_cost_ = np.eye(1, rows.shape[1], rows.shape[1] - 1)[0]
    model.col_lower_ = np.zeros(rows.shape[1])
    model.col_upper_ = np.concatenate([np.tile(problem.counts, groups), np.ones(groups), [infinity]]).astype(float)
    exact = problem.counts.astype(float)
    model.row_lower_ = np.concatenate([np.full(3 * groups, -infinity), exact, [-infinity]])
    model.row_upper_ = np.concatenate([np.full(groups, -problem.fixed), np.ones(groups), np.zeros(groups), exact, [problem.devices]])
    entry_rows, entry_columns = np.nonzero(rows)
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.searchsorted(entry_rows, np.arange(rows.shape[0] + 1))
    model.a_matrix_.index_ = entry_columns
    model.a_matrix_.value_ = rows[entry_rows, entry_columns]
    whole = [highspy.HighsVarType.kInteger] * (cells + groups)
    model.integrality_ = [*whole, highspy.HighsVarType.kContinuous]
    return model


def hand_out(counts: NDArray[np.int64], problem: Problem, documents: Sequence[int], bucket: NDArray[np.int64]) -> list[Group]:
    """Groups with documents of each bucket, as many as counted. ``documents`` are sorted as ``bucket`` is."""
    queues = [
        [document for document, of in zip(documents, bucket.tolist(), strict=True) if of == each] for each in range(len(problem.limits))
    ]
    groups = []
    for degree, row in zip(problem.degrees.tolist(), counts.tolist(), strict=True):
        group = Group(degree)
        for queue, count in zip(queues, row, strict=True):
            group.documents += [queue.pop() for _ in range(count)]
        groups.append(group)
    return groups
