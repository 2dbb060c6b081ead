"""Floating-point numbers of 4 and 8 bits in PyTorch: the definition of what csrc/common/minifloat.h computes.

Encoding rounds to nearest, ties to even, and saturates: what is beyond the largest finite number, infinity included, becomes that number.
NaN becomes 0x7f in the 8-bit formats and +6 in E2M1, which has none; its sign is dropped, because devices differ in it.
"""

import torch
from torch import Tensor

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST_FLOAT = torch.finfo(torch.float32).max
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
"""Largest finite numbers of the 8-bit formats."""


def encode_fp8(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes (uint8) of float32 ``x`` in float8_e4m3fn or float8_e5m2."""
    # PyTorch before 2.13 makes NaN of what is too large, so nothing too large is ever cast.
    codes = x.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype).view(torch.uint8)
    return torch.where(x.isnan(), 0x7F, codes).to(torch.uint8)


def encode_e2m1(x: Tensor) -> Tensor:
    """Codes 0...15 (uint8) of float32 ``x``: +-0, 0.5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign."""
    a = x.abs()
    code = sum((a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5.0), torch.zeros_like(a, dtype=torch.uint8))
    return torch.where(x.isnan(), 7, code | (x.signbit().to(torch.uint8) << 3)).to(torch.uint8)


def encode_e2m1_stochastic(x: Tensor, random: Tensor) -> Tensor:
    """Codes of float32 ``x``, rounded up with the probability of the distance to the number below it, in steps of 1/256.

    ``random`` (0...255) has the shape of ``x``: rounded up if distance + (random + 1/2) / 256 >= 1. So numbers of the format stay, and
    the expected value is within 1/512 of the spacing of the number.
    """
    a = x.abs().clamp(max=6.0)
    spacing = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0))
    below = (a / spacing).floor()
    up = (a / spacing - below) * 256 >= 255.5 - random
    first = torch.where(a < 2, 0, torch.where(a < 4, 2, 4))
    code = torch.nan_to_num(below).to(torch.uint8) + up.to(torch.uint8) + first.to(torch.uint8)
    return torch.where(x.isnan(), 7, code | (x.signbit().to(torch.uint8) << 3)).to(torch.uint8)


def decode_e2m1(codes: Tensor) -> Tensor:
    """float32 numbers of codes 0...15."""
    values = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], device=codes.device)
    return values[codes.long()]


def encode_e8m0(x: Tensor) -> Tensor:
    """Codes (uint8) of powers of two, code - 127 the exponent: ``x`` (float32, >= 0) rounded up, from 2^-127 (also 0) to 2^127 (also inf).

    NaN becomes 255.
    """
    mantissa, exponent = torch.frexp(x)
    code = (exponent + (mantissa > 0.5) + 126).clamp(0, 254)
    code = torch.where(x == 0, 0, torch.where(x.isinf(), 254, code))
    return torch.where(x.isnan(), 255, code).to(torch.uint8)


def decode_e8m0(codes: Tensor) -> Tensor:
    """float32 powers of two of codes; NaN of 255."""
    return codes.view(torch.float8_e8m0fnu).float()


def pack_nibbles(codes: Tensor) -> Tensor:
    """[..., K] codes 0...15 -> [..., K / 2] bytes, the even code in the low half."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """[..., K / 2] bytes -> [..., K] codes 0...15."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
