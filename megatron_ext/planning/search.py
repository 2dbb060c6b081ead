"""Least target that a greedy planner meets: a search that counts its tries and never looks at the clock."""

from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")
FIRST_STRIDE = 0.005
"""Of the lowest target, beyond which targets are tried at twice the distance each."""


def tries_for(documents: int) -> int:
    """Greedy plans that a planner may make of a step: fewer for more documents, so that planning stays short beside the step."""
    return max(10, min(100, 200_000 // max(1, documents)))


def gallop(meet: Callable[[float], Found | None], low: float, tries: int) -> list[Found]:
    """Try targets from ``low`` upward, in strides that double, until one is met, then bisect between it and the last that was not.

    Args:
        meet: the plan for a target, or None where the planner fails.
        low: target below which nothing is met.
        tries: most calls of ``meet`` after the first success; a target is looked for as long as it takes.

    Returns:
        All that was found, in the order of the tries; the last has the least target.
    """
    failed, target, stride = low, low, FIRST_STRIDE * max(low, 1e-30)
    while (found := meet(target)) is None:
        failed, target, stride, tries = target, target + stride, 2 * stride, tries - 1
    results = [found]
    while tries > 0 and target - failed > 1e-3 * target:
        middle = (failed + target) / 2
        if (found := meet(middle)) is None:
            failed = middle
        else:
            target = middle
            results.append(found)
        tries -= 1
    return results
