"""Digests of tensors that do not depend on how they are divided: equal bits have equal digests on every grid."""

from collections.abc import Iterable

import torch

from megatron_ext.optim.ownership import OwnedBox

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**20
_GOLDEN, _FIRST, _SECOND = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
MODULUS = 2**64

Digest = tuple[int, float]
"""Sum of the hashes of all elements modulo 2^64, and sum of their squares."""


def part_digest(part: OwnedBox, values: torch.Tensor, shape: torch.Size) -> Digest:
    """The digest of a part of a parameter of ``shape``; those of its parts sum to that of the whole.

    An element's hash is of its place in the whole parameter and of its bits, mixed as splitmix64 does (Steele et al. 2014, "Fast
    splittable pseudorandom number generators", figure 14), so that exchanged elements and changed ones that cancel in a sum are seen.
    """
    flat = values.detach().reshape(-1)
    bits, places = flat.view(_BITS[flat.element_size()]), _places(part, shape, flat.device).reshape(-1)
    total, squares = 0, 0.0
    for begin in range(0, len(flat), _CHUNK):
        chunk = slice(begin, begin + _CHUNK)
        hashes = _mixed(_mixed(places[chunk] * _GOLDEN) ^ bits[chunk].to(torch.int64))
        total += int(hashes.sum())
        squares += float(flat[chunk].double().square().sum())
    return total % MODULUS, squares


def summed(digests: Iterable[Digest]) -> Digest:
    """The digest of what several parts make up."""
    digests = list(digests)
    return sum(total for total, _ in digests) % MODULUS, sum(squares for _, squares in digests)


def _places(part: OwnedBox, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Number of each element of the part in the whole parameter, counted from 1; int64 of the part's shape."""
    places = torch.ones((), dtype=torch.int64, device=device)
    stride = 1
    for (start, stop), size in zip(reversed(part.box), reversed(shape), strict=True):
        along = torch.arange(start, stop, device=device) * stride
        places = along.reshape(-1, *[1] * places.ndim) + places
        stride *= size
    return places


def _mixed(values: torch.Tensor) -> torch.Tensor:
    """The finalizer of splitmix64, on int64 that wrap around."""
    values = (values ^ _shifted(values, 30)) * _FIRST
    values = (values ^ _shifted(values, 27)) * _SECOND
    return values ^ _shifted(values, 31)


def _shifted(values: torch.Tensor, by: int) -> torch.Tensor:
    """To the right, zeros coming in."""
    return (values >> by) & (2 ** (64 - by) - 1)
