"""Best-fit decreasing bin packing of documents into packs (Ding et al. 2024, "Fewer Truncations Improve Language Modeling")."""

from bisect import bisect_left, insort
from collections.abc import Sequence


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
