"""First fit in logarithmic time: a tree of the most that open packs have room for. Compiled."""

import numpy as np
from numba import njit

from megatron_ext.planning.problem import Array


@njit(cache=True)
def room_tree(leaves: int) -> Array:
    """A tree of at least so many leaves without room: node 1 is the root, nodes 2 n and 2 n + 1 are below n, the last half are leaves."""
    size = 1
    while size < leaves:
        size *= 2
    return np.full(2 * size, -1.0)


@njit(cache=True)
def set_room(tree: Array, leaf: int, room: float) -> None:
    """Write the room of a leaf and the maxima above it."""
    node = leaf + len(tree) // 2
    tree[node] = room
    node >>= 1
    while node:
        most = max(tree[2 * node], tree[2 * node + 1])
        if tree[node] == most:
            break
        tree[node] = most
        node >>= 1


@njit(cache=True)
def first_fit(tree: Array, needed: float) -> int:
    """The first leaf with room for ``needed``, or -1."""
    if tree[1] < needed:
        return -1
    node, leaves = 1, len(tree) // 2
    while node < leaves:
        node = 2 * node if tree[2 * node] >= needed else 2 * node + 1
    return node - leaves


@njit(cache=True)
def exchange(knots: Array, seconds: Array, row: int, tokens: float) -> float:
    """Seconds that a pack spends in exchanges: a row of an ExchangeTable, interpolated."""
    if tokens <= 0 or row == 0:
        return 0.0
    low, high = 0, knots.shape[1] - 1
    while high - low > 1:
        middle = (low + high) // 2
        if knots[row, middle] <= tokens:
            low = middle
        else:
            high = middle
    width = knots[row, high] - knots[row, low]
    if width <= 0:
        return seconds[row, low]
    return seconds[row, low] + (seconds[row, high] - seconds[row, low]) * (tokens - knots[row, low]) / width
