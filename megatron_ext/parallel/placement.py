"""Which part of which parameter a rank holds, in the coordinates of the whole parameter."""

from dataclasses import dataclass

import torch

Box = tuple[tuple[int, int], ...]
"""(start, stop) along each dimension; empty for a tensor without dimensions."""


@dataclass(frozen=True)
class Placement:
    """One rank's part of a parameter."""

    shape: torch.Size
    """Of the whole parameter."""
    box: Box
    """What this rank holds."""
    replicas: tuple[int, ...]
    """Global ranks of this data-parallel line's model (tensor and pipeline ranks) that hold the same box, in order, this one included."""
    partial: bool
    """True where each replica computes a part of the gradient, so that they must be summed; false where each computes all of it."""


def whole_box(shape: torch.Size) -> Box:
    """The box of a whole tensor."""
    return tuple((0, size) for size in shape)


def box_shape(box: Box) -> torch.Size:
    """Shape of a box."""
    return torch.Size(stop - start for start, stop in box)


def intersection(one: Box, other: Box) -> Box | None:
    """What two boxes of one tensor share; None if nothing."""
    shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return shared if all(start < stop for start, stop in shared) else None


def slices(box: Box, origin: Box) -> tuple[slice, ...]:
    """Index of ``box`` in a tensor that holds ``origin``."""
    return tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(box, origin, strict=True))
