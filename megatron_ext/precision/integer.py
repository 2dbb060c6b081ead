"""Integers of few bits: values rounded to nearest and multiplied back, as a product of integer matrices sees them.

The grids, for b bits and a scale s for every row (last dimension) of a matrix, so for each output channel of a weight [out, in] and each
token of activations [T, in]:

symmetric     s x {-2^(b-1), ..., 2^(b-1) - 1}, s = max|x| / (2^(b-1) - 1); the lowest number is used only where values are clipped
asymmetric    s x ({0, ..., 2^b - 1} - z), s = (max(x, 0) - min(x, 0)) / (2^b - 1), z = round(-min(x, 0) / s), so that 0 stays 0

Ties go to even. These are the grids with which QuaRot (arXiv:2404.00456) and Outlier-Safe Pre-Training (arXiv:2506.19697) evaluate.
Computed in float32 (float64 for float64); a row with infinity or NaN becomes NaN.
"""

import torch
from torch import Tensor

from megatron_ext.errors import ConfigError

FEWEST_BITS, MOST_BITS = 2, 8
SMALLEST_CLIP, CLIP_STEPS = 0.2, 100
CLIP_NORM = 2.4
"""Exponent of the errors that a clipped scale minimizes, as in the published code of GPTQ (arXiv:2210.17323) and QuaRot."""


def quantize_symmetric(x: Tensor, bits: int) -> Tensor:
    """``x`` [..., n] of any floating-point type on the symmetric grid, a scale for every row.

    Raises:
        ConfigError: ``bits`` is not 2 to 8.
    """
    wide = _wide(x, bits)
    return _on_symmetric_grid(wide, _symmetric_scale(wide, bits), bits).to(x.dtype)


def quantize_clipped(x: Tensor, bits: int) -> Tensor:
    """As ``quantize_symmetric`` with each row's scale times 1, 0.99 ... or 0.21, whichever has the least sum of |error|^2.4."""
    wide = _wide(x, bits)
    whole = _symmetric_scale(wide, bits)
    best = _on_symmetric_grid(wide, whole, bits)
    least = _distance(best, wide)
    for step in range(1, round(CLIP_STEPS * (1 - SMALLEST_CLIP))):
        clipped = _on_symmetric_grid(wide, whole * (1 - step / CLIP_STEPS), bits)
        distance = _distance(clipped, wide)
        best = torch.where(distance < least, clipped, best)
        least = torch.minimum(distance, least)
    return best.to(x.dtype)


def quantize_asymmetric(x: Tensor, bits: int) -> Tensor:
    """``x`` [..., n] on the asymmetric grid, a scale and a zero point for every row; type and errors as ``quantize_symmetric``."""
    wide = _wide(x, bits)
    if not wide.shape[-1]:
        return x.clone()
    highest = 2**bits - 1
    low, high = wide.amin(-1, keepdim=True).clamp_max(0.0), wide.amax(-1, keepdim=True).clamp_min(0.0)
    scale = _positive((high - low) / highest)
    zero = (-low / scale).round()
    return (((wide / scale).round() + zero).clamp(0, highest).sub(zero) * scale).to(x.dtype)


def _wide(x: Tensor, bits: int) -> Tensor:
    if not FEWEST_BITS <= bits <= MOST_BITS:
        raise ConfigError(f"integers of {bits} bits; accepted are {FEWEST_BITS} to {MOST_BITS}")
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _symmetric_scale(x: Tensor, bits: int) -> Tensor:
    """[..., 1] of ``x`` [..., n]."""
    return _positive(torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True) / (2 ** (bits - 1) - 1))


def _on_symmetric_grid(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    return (x / scale).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).mul_(scale)


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """[..., 1] of [..., n]."""
    return (x - y).abs_().pow_(CLIP_NORM).sum(-1, keepdim=True)


def _positive(scale: Tensor) -> Tensor:
    """Rows of zeros have a scale of 0, by which nothing can be divided."""
    return scale.clamp_min(torch.finfo(scale.dtype).tiny)
