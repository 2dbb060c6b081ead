"""Formats that a trained model is evaluated in: how weights are rounded, and how the inputs of linears are."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.fp8_quantize import fp8_dequantize, fp8_quantize
from megatron_ext.kernels.mxfp4_quantize import mxfp4_dequantize, mxfp4_quantize
from megatron_ext.kernels.nvfp4_quantize import nvfp4_dequantize, nvfp4_quantize
from megatron_ext.precision.integer import (
    FEWEST_BITS,
    MOST_BITS,
    quantize_asymmetric,
    quantize_clipped,
    quantize_symmetric,
)

Quantizer = Callable[[Tensor], Tensor]
"""From a matrix to the numbers that its codes stand for, of the same shape and type. Scales are shared along the last dimension."""


def _nvfp4(x: Tensor) -> Tensor:
    return nvfp4_dequantize(nvfp4_quantize(x), x.dtype)


def _mxfp4(x: Tensor) -> Tensor:
    return mxfp4_dequantize(mxfp4_quantize(x), x.dtype)[:, : x.shape[1]]


def _fp8(x: Tensor, scaling: str) -> Tensor:
    return fp8_dequantize(fp8_quantize(x, scaling=scaling), x.dtype)


FLOATS: Mapping[str, Quantizer] = {
    "nvfp4": _nvfp4,
    "mxfp4": _mxfp4,
    "mxfp8": partial(_fp8, scaling="mx"),
    "fp8_rowwise": partial(_fp8, scaling="rowwise"),
}
"""Formats of floating-point numbers, by name."""
INTEGERS = re.compile(r"W(\d+)A(\d+)(?:KV(\d+))?", re.IGNORECASE)
UNQUANTIZED_BITS = 16
CACHE_GROUP = 128
"""Channels of a head that share a scale and a zero point in keys and values, as in QuaRot (arXiv:2404.00456)."""
ACCEPTED = (
    f"WxAy or WxAyKVz with {FEWEST_BITS} to {MOST_BITS} or {UNQUANTIZED_BITS} (not quantized) bits, such as W4A4, W8A8, W4A16, W4A4KV4; "
    f"{', '.join(FLOATS)}"
)


@dataclass(frozen=True)
class Scheme:
    """How the linears of a model are rounded, to nearest. None: not at all."""

    name: str
    weight: Quantizer | None
    """Of a weight [out, in]."""
    activation: Quantizer | None
    """Of the inputs [T, in] of a linear."""
    cache: Quantizer | None = None
    """Of keys, after rotation, and of values [T, heads, head_dim]: what a cache of them would keep."""


def named_scheme(name: str, *, asymmetric: bool = False, clip_weights: bool = False) -> Scheme:
    """The scheme that ``name`` says, in any case of letters.

    ``W4A4`` and the like are integers: weights symmetric for each output channel, activations for each token; with ``KV4`` keys and
    values too, asymmetric for each token and each head (or each ``CACHE_GROUP`` channels of it). The others are formats of floating-point
    numbers for weights and activations alike, with scales for 1 x 16 (``nvfp4``) or 1 x 32 (``mxfp4``, ``mxfp8``) values, or for a row
    (``fp8_rowwise``). ``nvfp4`` has a scale of the whole tensor too: that of activations is of all tokens computed together, so that a
    token's numbers depend a little on the others.

    Args:
        name: see above.
        asymmetric: integers of activations on the asymmetric grid.
        clip_weights: integers of weights with scales that are searched for.

    Raises:
        ConfigError: there is no such scheme, or it quantizes nothing.
    """
    if name.lower() in FLOATS:
        quantizer = FLOATS[name.lower()]
        return Scheme(name.lower(), quantizer, quantizer)
    match = INTEGERS.fullmatch(name)
    bits = [int(number or UNQUANTIZED_BITS) for number in match.groups()] if match else []
    accepted = {*range(FEWEST_BITS, MOST_BITS + 1), UNQUANTIZED_BITS}
    if not bits or not accepted.issuperset(bits) or min(bits) == UNQUANTIZED_BITS:
        raise ConfigError(f"quantization scheme {name!r}; accepted: {ACCEPTED}")
    weight = quantize_clipped if clip_weights else quantize_symmetric
    activation = quantize_asymmetric if asymmetric else quantize_symmetric
    return Scheme(name.upper(), _integers(weight, bits[0]), _integers(activation, bits[1]), _integers(_quantize_cache, bits[2]))


def _integers(quantizer: Callable[[Tensor, int], Tensor], bits: int) -> Quantizer | None:
    return None if bits == UNQUANTIZED_BITS else partial(quantizer, bits=bits)


def _quantize_cache(x: Tensor, bits: int) -> Tensor:
    return torch.cat([quantize_asymmetric(group, bits) for group in x.split(CACHE_GROUP, -1)], -1)
