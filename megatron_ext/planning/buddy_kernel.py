"""First-fit decreasing of documents into packs on a buddy tree of blocks, all done by a target. Compiled.

Degrees go down: when the blocks of a degree get their packs, all ranks of a block are free at the same time, and no rank ever waits.
"""

import numpy as np
from numba import njit

from megatron_ext.planning.first_fit import exchange, first_fit, room_tree, set_room
from megatron_ext.planning.problem import Array, Problem

ROUNDING = 1e-9
"""Share of the target that a rank may exceed it by, so that a target taken from a plan admits that plan."""
TINY = 1e-30
"""Seconds, in place of none where something is divided by them."""


@njit(cache=True)
def fill_blocks(problem: Problem, target: float, pack: Array, first_rank: Array, row_of: Array) -> int:
    """Fill blocks with documents, longest first: into the first pack with room, else a new pack on the first block with time.

    Args:
        problem: what there is to plan.
        target: seconds by which all ranks have to be done.
        pack: written: pack of each document, [documents].
        first_rank: written: of each pack, [documents].
        row_of: written: log2 of the degree of each pack, [documents].

    Returns:
        Number of packs, or -1 if the documents do not fit.
    """
    count, limit = len(problem.lengths), target * (1 + ROUNDING)
    rows = _choose_rows(problem, limit)
    if rows.min() < 0:
        return -1
    following = np.arange(count + 1)
    free, pack_tokens = np.zeros(problem.devices), np.zeros(count)
    packs = 0
    for row in range(len(problem.knots) - 1, -1, -1):
        if not (rows == row).any():
            continue
        begin = packs
        packs = _fill_degree(problem, limit, row, rows, following, free, pack_tokens, begin, pack, first_rank, row_of)
        if packs < 0:
            return -1
        if row > 0:
            _top_up(problem, limit, row, following, free, pack_tokens, begin, packs, pack, first_rank)
        for number in range(begin, packs):
            free[first_rank[number] : first_rank[number] + (1 << row)] = free[first_rank[number]]
    return packs


@njit(cache=True)
def _choose_rows(problem: Problem, limit: float) -> Array:
    """Row (log2 of the degree) at which each document takes least device-seconds among those that it fits and is done in time.

    -1 where there is none. A document's share of what packs cost is the same at every degree.
    """
    rows = np.full(len(problem.lengths), -1)
    for document in range(len(rows)):
        least = np.inf
        for row in range(len(problem.knots)):
            degree = 1 << row
            if problem.capacity * degree < problem.lengths[document]:
                continue
            own = problem.work[document] / degree + exchange(problem.knots, problem.table, row, problem.lengths[document])
            if problem.per_pack + own <= limit and own * degree < least:
                rows[document], least = row, own * degree
    return rows


@njit(cache=True)
def _added(problem: Problem, row: int, held: float, document: int) -> float:
    """Seconds that a document adds to a pack that holds ``held`` tokens."""
    before = exchange(problem.knots, problem.table, row, held)
    return problem.work[document] / (1 << row) + exchange(problem.knots, problem.table, row, held + problem.lengths[document]) - before


@njit(cache=True)
def _fill_degree(
    problem: Problem,
    limit: float,
    row: int,
    rows: Array,
    following: Array,
    free: Array,
    pack_tokens: Array,
    packs: int,
    pack: Array,
    first_rank: Array,
    row_of: Array,
) -> int:
    """Packs of one degree for the documents that want it. Returns the number of packs, or -1."""
    degree, begin = 1 << row, packs
    room = problem.capacity * degree
    blocks, wanted = problem.devices // degree, int((rows == row).sum())
    fitting, time_left = room_tree(wanted), room_tree(blocks)
    newest, before = np.full(blocks, -1), np.full(wanted, -1)  # packs of a block, each pointing to the one before
    for block in range(blocks):
        set_room(time_left, block, limit - free[block * degree])
    for document in range(len(rows)):
        if rows[document] != row or following[document] != document:
            continue
        tokens, block = problem.lengths[document], -1
        at = first_fit(fitting, tokens)
        while at >= 0:
            spent = _added(problem, row, pack_tokens[begin + at], document)
            block = first_rank[begin + at] // degree
            if free[block * degree] + spent <= limit:
                break
            left = limit - free[block * degree]
            set_room(fitting, at, _longest_fitting(problem, row, pack_tokens[begin + at], document, left))
            at = first_fit(fitting, tokens)
        if at < 0:
            spent = problem.per_pack + _added(problem, row, 0.0, document)
            block = first_fit(time_left, time_left[1])
            if free[block * degree] + spent > limit:
                return -1
            at = packs - begin
            before[at], newest[block] = newest[block], at
            first_rank[packs], row_of[packs] = block * degree, row
            packs += 1
        pack[document], following[document] = begin + at, document + 1
        pack_tokens[begin + at] += tokens
        free[block * degree] += spent
        left = limit - free[block * degree]
        set_room(time_left, block, left)
        at = newest[block]
        while at >= 0:
            set_room(fitting, at, min(room - pack_tokens[begin + at], left / max(problem.rates[row], TINY)))
            at = before[at]
    return packs


@njit(cache=True)
def _longest_fitting(problem: Problem, row: int, held: float, document: int, left: float) -> float:
    """Tokens of the longest document after ``document``, which takes too long, that a pack has ``left`` seconds for; or -1."""
    low, high = document + 1, len(problem.lengths)
    while low < high:
        middle = (low + high) // 2
        if _added(problem, row, held, middle) <= left:
            high = middle
        else:
            low = middle + 1
    return min(problem.lengths[low], problem.lengths[document] - 1) if low < len(problem.lengths) else -1.0


@njit(cache=True)
def _top_up(
    problem: Problem,
    limit: float,
    row: int,
    following: Array,
    free: Array,
    pack_tokens: Array,
    begin: int,
    end: int,
    pack: Array,
    first_rank: Array,
) -> None:
    """Fill what is left of packs with documents that want a smaller degree, the longest that fit first, where that saves device-seconds.

    It does where exchanging a token takes less than its share of what a new pack costs, and where too little time is left for new packs.
    """
    degree, count = 1 << row, len(following) - 1
    room = problem.capacity * degree
    exchanged = exchange(problem.knots, problem.table, row, room) / problem.capacity
    rate = problem.rates[0]
    for number in range(begin, end):
        rank = first_rank[number]
        left = limit - free[rank]
        filled = min(room - pack_tokens[number], left * degree / max(rate + exchanged, TINY))
        opened = degree * min(problem.capacity, max(0.0, left - problem.per_pack) / max(rate, TINY))
        if exchanged * problem.capacity > problem.per_pack and filled <= opened:
            continue
        document = _unplaced(following, _first_not_above(problem.lengths, room - pack_tokens[number]))
        while document < count:
            spent = _added(problem, row, pack_tokens[number], document)
            if free[rank] + spent <= limit:
                pack[document], following[document] = number, document + 1
                pack_tokens[number] += problem.lengths[document]
                free[rank] += spent
                document = max(document, _first_not_above(problem.lengths, room - pack_tokens[number]))
            else:
                document += 1
            document = _unplaced(following, document)


@njit(cache=True)
def _unplaced(following: Array, document: int) -> int:
    """The first document from ``document`` on that has no pack, or one past the last; paths are halved on the way."""
    while following[document] != document:
        following[document] = following[following[document]]
        document = following[document]
    return document


@njit(cache=True)
def _first_not_above(lengths: Array, most: float) -> int:
    """The first of descending lengths that is not above ``most``, or one past the last."""
    low, high = 0, len(lengths)
    while low < high:
        middle = (low + high) // 2
        if lengths[middle] > most:
            low = middle + 1
        else:
            high = middle
    return low
