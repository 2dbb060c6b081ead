"""How unevenly the channels of a token are filled: kurtosis and its kin, from sums that may come from several ranks."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

POWERS = 5
"""Sums over channels: of |x|, x, x^2, x^3 and x^4."""


@dataclass(frozen=True)
class TokenSums:
    """What is known of the channels of each token; parts of the channels are added up by adding ``powers``."""

    powers: Tensor
    """float64 [..., 5, T], see ``POWERS``."""
    largest: Tensor
    """Largest |x|, float64 [..., T]."""


def token_sums(x: Tensor) -> TokenSums:
    """Sums over the channels of ``x`` [T, channels]: computed in its dtype, or in float32 for half precision."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    magnitudes, squares = wide.abs(), wide.square()
    # Products along channels: their sums are not written out, which is most of the time on a CPU.
    cubes, fourths = torch.linalg.vecdot(squares, wide), torch.linalg.vecdot(squares, squares)
    powers = torch.stack([magnitudes.sum(-1), wide.sum(-1), squares.sum(-1), cubes, fourths])
    return TokenSums(powers.double(), magnitudes.amax(-1).double())


def kurtosis_released(sums: TokenSums, width: int) -> Tensor:
    """Excess kurtosis of each token [..., T] as the script that Park et al. 2025, arXiv:2506.19697, released computes it.

    max(0, mean(x^4) / s^4 - 3) with s the unbiased standard deviation: the fourth powers are not centred, and what is below 0 is cut
    off, so that normal noise does not give 0 but ``floor_released``. 0 where all channels are 0.
    """
    _, first, second, _, fourth = sums.powers.unbind(-2)
    variance = (second - first.square() / width) / (width - 1)
    return _ratio(fourth / width, variance.square()).sub_(3).clamp_(min=0)


def kurtosis_centred(sums: TokenSums, width: int) -> Tensor:
    """Excess kurtosis of each token [..., T]: m4 / m2^2 - 3 with central moments m, 0 where all channels are 0."""
    _, *raw = (sums.powers / width).unbind(-2)
    mean, second, third, fourth = raw
    square = mean.square()
    central = fourth - 4 * mean * third + 6 * square * second - 3 * square.square()
    ratio = _ratio(central, (second - square).square())
    return torch.where(second == 0, 0.0, ratio - 3)


def max_to_mean(sums: TokenSums, width: int) -> Tensor:
    """Largest |x| of each token over its mean |x| [..., T]; 0 where all channels are 0."""
    return _ratio(sums.largest, sums.powers[..., 0, :] / width)


def variance(sums: TokenSums, width: int) -> Tensor:
    """Mean square of the channels of each token about their mean [..., T]."""
    _, first, second, _, _ = sums.powers.unbind(-2)
    return second / width - (first / width).square()


def floor_released(width: int) -> float:
    """What ``kurtosis_released`` of ``width`` independent normal channels is in the mean, within a few percent from 64 channels on.

    Taken to be normal before it is cut off at 0, with its exact mean and the exact variance of the centred kurtosis (Fisher 1930).
    """
    n = max(width, 6)
    mean = ((n - 1) / n) ** 2 * (3 / ((n - 3) * (n - 5)) + 6 / (n - 3) + 3 * (n - 1) / (n + 1)) - 3
    deviation = math.sqrt(24 * n * (n - 2) * (n - 3) / ((n + 1) ** 2 * (n + 3) * (n + 5)))
    at = mean / deviation
    return mean * 0.5 * math.erfc(-at / math.sqrt(2)) + deviation * math.exp(-at * at / 2) / math.sqrt(2 * math.pi)


def floor_centred(width: int) -> float:
    """What ``kurtosis_centred`` of ``width`` independent normal channels is in the mean."""
    return -6 / (width + 1)


def _ratio(over: Tensor, under: Tensor) -> Tensor:
    """0 where both are 0; NaN stays."""
    return torch.where((under == 0) & (over == 0), 0.0, over / under)
