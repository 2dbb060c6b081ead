"""First-fit decreasing of documents into the packs of several rounds at once, each with its own target seconds. Compiled."""

import numpy as np
from numba import njit

from megatron_ext.planning.first_fit import exchange, first_fit, room_tree, set_room
from megatron_ext.planning.problem import Array, Problem

ROUNDING = 1e-9
"""Share of a target that a pack may exceed it by, so that a target taken from a pack admits that pack."""
TINY = 1e-30
"""Seconds, in place of none where something is divided by them."""


@njit(cache=True)
def _open_where(problem: Problem, length: float, work: float, targets: Array, used: Array) -> tuple[int, int]:
    """Round and row of the block that computes a document in least device-seconds within its round's target, of equals the tightest."""
    best_round, best_row, least = -1, -1, np.inf
    for row in range(len(problem.knots)):
        degree = 1 << row
        if problem.capacity * degree < length:
            continue
        own = work / degree + exchange(problem.knots, problem.table, row, length)
        if own * degree >= least * (1 + ROUNDING):
            continue
        for each in range(len(targets)):
            begin = (used[each] + degree - 1) // degree * degree
            if begin + degree > problem.devices or problem.per_pack + own > targets[each] * (1 + ROUNDING):
                continue
            if own * degree < least * (1 - ROUNDING) or targets[each] < targets[best_round]:
                best_round, best_row, least = each, row, own * degree
    return best_round, best_row


@njit(cache=True)
def _seconds_with(problem: Problem, row: int, tokens: float, work: float, document: int) -> float:
    """Seconds of a pack of these tokens and this work, and of one document more."""
    exchanges = exchange(problem.knots, problem.table, row, tokens + problem.lengths[document])
    return problem.per_pack + (work + problem.work[document]) / (1 << row) + exchanges


@njit(cache=True)
def _longest_fitting(problem: Problem, row: int, tokens: float, work: float, document: int, limit: float) -> float:
    """Tokens of the longest document after ``document``, which has too much work for a pack, that a pack has the time for; or -1."""
    low, high = document + 1, len(problem.lengths)
    while low < high:
        middle = (low + high) // 2
        if _seconds_with(problem, row, tokens, work, middle) <= limit:
            high = middle
        else:
            low = middle + 1
    return min(problem.lengths[low], problem.lengths[document] - 1) if low < len(problem.lengths) else -1.0


@njit(cache=True)
def fill_rounds(problem: Problem, targets: Array, pack: Array, round_of: Array, first_rank: Array, row_of: Array, longest: Array) -> int:
    """Fill rounds with documents, longest first: into the first pack with room, else a new block, else give up.

    Args:
        problem: what there is to plan.
        targets: seconds that the packs of each round may take, [rounds].
        pack: written: pack of each document, [documents].
        round_of: written: round of each pack, [at least as many as packs].
        first_rank: written, likewise.
        row_of: written: log2 of the degree, likewise.
        longest: written: seconds of the longest pack of each round, [rounds].

    Returns:
        Number of packs, or -1 if the documents do not fit.
    """
    lengths, work = problem.lengths, problem.work
    longest[:] = 0.0
    most = min(len(lengths), len(targets) * problem.devices)
    room = room_tree(most)
    pack_tokens, pack_work = np.zeros(most), np.zeros(most)
    used = np.zeros(len(targets), dtype=np.int64)
    packs = 0
    for document in range(len(lengths)):
        at = first_fit(room, lengths[document])
        while at >= 0:
            limit = targets[round_of[at]] * (1 + ROUNDING)
            if _seconds_with(problem, row_of[at], pack_tokens[at], pack_work[at], document) <= limit:
                break
            set_room(room, at, _longest_fitting(problem, row_of[at], pack_tokens[at], pack_work[at], document, limit))
            at = first_fit(room, lengths[document])
        if at < 0:
            chosen, row = _open_where(problem, lengths[document], work[document], targets, used)
            if chosen < 0:
                return -1
            at, degree = packs, 1 << row
            begin = (used[chosen] + degree - 1) // degree * degree
            used[chosen] = begin + degree
            round_of[at], row_of[at], first_rank[at] = chosen, row, begin
            packs += 1
        row = row_of[at]
        seconds = _seconds_with(problem, row, pack_tokens[at], pack_work[at], document)
        longest[round_of[at]] = max(longest[round_of[at]], seconds)
        pack[document] = at
        pack_tokens[at] += lengths[document]
        pack_work[at] += work[document]
        left = targets[round_of[at]] * (1 + ROUNDING) - seconds
        set_room(room, at, min(problem.capacity * (1 << row) - pack_tokens[at], left / max(problem.rates[row], TINY)))
    return packs
