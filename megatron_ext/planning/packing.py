"""Best-fit decreasing bin packing of documents into packs (Ding et al. 2024, "Fewer Truncations Improve Language Modeling")."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heapreplace

import numpy as np
from numpy.typing import NDArray


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put each document, longest first, into the open pack that it fills best; open a pack when none has room.

    Args:
        lengths: tokens of each document, each at most ``capacity``.
        capacity: most tokens of a pack.

    Returns:
        The packs, each a list of indices into ``lengths``. Equal lengths keep their order, so the result is a pure function of the input.
    """
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, pack), sorted: the first entry with enough room is the best fit
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        assert length <= capacity, "documents are cut to the capacity before they are packed"
        place = bisect_left(rooms, (length, -1))
        if place == len(rooms):
            free, pack = capacity, len(packs)
            packs.append([])
        else:
            free, pack = rooms.pop(place)
        packs[pack].append(index)
        insort(rooms, (free - length, pack))
    return packs


def longest_first(seconds: Sequence[float] | NDArray[np.float64], blocks: int) -> NDArray[np.int64]:
    """Longest processing time first (Graham 1969): each pack to the block that is done first, of equals the first.

    Args:
        seconds: of each pack, descending.
        blocks: number of them.

    Returns:
        The block of each pack.
    """
    loads = [(0.0, block) for block in range(blocks)]
    chosen = np.zeros(len(seconds), dtype=np.int64)
    for number, each in enumerate(np.asarray(seconds).tolist()):
        load, block = loads[0]
        chosen[number] = block
        heapreplace(loads, (load + each, block))
    return chosen


def pack_best_fit(lengths: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], int]:
    """Best-fit decreasing: the pack of each document, and the number of packs."""
    bins = best_fit_decreasing(lengths.tolist(), capacity)
    pack = np.zeros(len(lengths), dtype=np.int64)
    for number, documents in enumerate(bins):
        pack[documents] = number
    return pack, len(bins)
