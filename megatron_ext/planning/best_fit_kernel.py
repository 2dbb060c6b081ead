"""Best-fit decreasing for a hundred thousand documents: free tokens of open packs in a sorted list of short runs. Compiled."""

import numpy as np
from numba import njit
from numpy.typing import NDArray

RUN = 256
"""Most entries of a run; a full one is cut in two."""
PACKS = 1 << 32
"""An entry is free tokens times this, and the number of the pack: the order of entries is the order of (free tokens, pack)."""


@njit(cache=True)
def _run_of(runs: NDArray, sizes: NDArray, order: NDArray, used: int, entry: int) -> int:
    """Place of the first run whose last entry is not below ``entry``; ``used`` if there is none."""
    low, high = 0, used
    while low < high:
        middle = (low + high) // 2
        run = order[middle]
        if runs[run, sizes[run] - 1] < entry:
            low = middle + 1
        else:
            high = middle
    return low


@njit(cache=True)
def _insert(runs: NDArray, sizes: NDArray, order: NDArray, used: int, entry: int) -> int:
    """Put an entry in its place; returns the number of runs in use. Behind those, ``order`` holds the runs that are not in use."""
    if used == 0:
        runs[order[0], 0], sizes[order[0]] = entry, 1
        return 1
    place = min(_run_of(runs, sizes, order, used, entry), used - 1)
    run = order[place]
    if sizes[run] == RUN:
        half, other = RUN // 2, order[used]
        runs[other, :half] = runs[run, half:]
        sizes[run], sizes[other] = half, half
        for at in range(used, place + 1, -1):
            order[at] = order[at - 1]
        order[place + 1] = other
        used += 1
        if runs[run, half - 1] < entry:
            run = other
    at = sizes[run]
    while at > 0 and runs[run, at - 1] > entry:
        runs[run, at] = runs[run, at - 1]
        at -= 1
    runs[run, at] = entry
    sizes[run] += 1
    return used


@njit(cache=True)
def best_fit_packs(lengths: NDArray, capacity: int, pack: NDArray) -> int:
    """What ``best_fit_decreasing`` does, for lengths that are sorted.

    Args:
        lengths: tokens of the documents, descending int64, [documents].
        capacity: most tokens of a pack, below 2**31.
        pack: written: pack of each document, [documents].

    Returns:
        Number of packs.
    """
    most = 2 * len(lengths) // RUN + 2  # between two cuts of a run lie half as many insertions as it holds
    runs, sizes, order = np.zeros((most, RUN), np.int64), np.zeros(most, np.int64), np.arange(most)
    used, packs = 0, 0
    for document in range(len(lengths)):
        length = lengths[document]
        place = _run_of(runs, sizes, order, used, length * PACKS)
        if place == used:
            free, number = capacity, packs
            packs += 1
        else:
            run = order[place]
            at = np.searchsorted(runs[run, : sizes[run]], length * PACKS)
            free, number = runs[run, at] // PACKS, runs[run, at] % PACKS
            sizes[run] -= 1
            for later in range(at, sizes[run]):
                runs[run, later] = runs[run, later + 1]
            if sizes[run] == 0:
                for later in range(place, used - 1):
                    order[later] = order[later + 1]
                used -= 1
                order[used] = run
        pack[document] = number
        if free - length >= lengths[-1]:
            used = _insert(runs, sizes, order, used, (free - length) * PACKS + number)
    return packs


def pack_compiled(lengths: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], int]:
    """As ``packing.pack_best_fit``, much faster for many documents."""
    order = np.argsort(-lengths, kind="stable")
    pack, chosen = np.zeros((2, len(lengths)), dtype=np.int64)
    # More room than there are tokens changes nothing, and keeps entries within 64 bits.
    packs = best_fit_packs(lengths[order], min(capacity, int(lengths.sum())), chosen) if len(lengths) else 0
    pack[order] = chosen
    return pack, packs
