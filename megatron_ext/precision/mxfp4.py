"""MXFP4 (OCP microscaling formats 1.0) in PyTorch: E2M1 codes, a power of two for each block of 32. There are no compiled kernels of it.

The scale of a block is the power of two at or above amax / 6, so that nothing saturates; a block of zeros has 2^-127.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.kernels.hadamard import hadamard_transform
from megatron_ext.kernels.minifloat import (
    decode_e2m1,
    decode_e8m0,
    encode_e2m1,
    encode_e2m1_stochastic,
    encode_e8m0,
    pack_nibbles,
    unpack_nibbles,
)
from megatron_ext.kernels.philox import block_random

BLOCK = 32


@dataclass(frozen=True)
class MXFP4Tensor:
    """A matrix [M, K] as E2M1 codes along K, filled up with zeros to K', a multiple of 32. The values are code x 2^(scale - 127)."""

    codes: Tensor
    """uint8 [M, K' / 2], two codes a byte, the even one in the low half."""
    scales: Tensor
    """uint8 [M, K' / 32], or [ceil(M / 32), K' / 32] for square blocks."""
    shape: tuple[int, int]
    """M, K."""
    square: bool = False
    """Blocks of 32 x 32."""


def mxfp4_quantize(
    x: Tensor,
    *,
    square: bool = False,
    seed: int | None = None,
    stream: int = 0,
    signs: Tensor | None = None,
    offset: tuple[int, int] = (0, 0),
) -> MXFP4Tensor:
    """Quantize the rows of a matrix.

    Args:
        x: [M, K] of a floating-point type.
        square: one scale for 32 x 32 values instead of 1 x 32.
        seed: round up or down at random from these 63 bits; None: to nearest, ties to even.
        stream: tells the random numbers of two quantizations of one matrix apart.
        signs: [32] of +-1: transform every 32 neighbours of a row first, rounded to the type of ``x``.
        offset: row and column of ``x`` in the whole matrix, for random numbers that do not depend on how it is divided.

    Returns:
        Codes and scales.
    """
    padded = F.pad(x, (0, -x.shape[1] % BLOCK))
    if signs is not None:
        padded = hadamard_transform(padded, BLOCK**-0.5, signs, BLOCK)
    height = BLOCK if square else 1
    blocks = F.pad(padded.float(), (0, 0, 0, -len(x) % height)).unflatten(1, (-1, BLOCK)).unflatten(0, (-1, height))
    scales = encode_e8m0(blocks.abs().amax((1, 3)) / 6.0)
    scaled = (blocks / decode_e8m0(scales)[:, None, :, None]).flatten(0, 1)[: len(x)].flatten(1)
    if seed is None:
        codes = encode_e2m1(scaled)
    else:
        rows = torch.arange(len(x), device=x.device)[:, None] + offset[0]
        places = torch.arange(scaled.shape[1] // 16, device=x.device)[None] + offset[1] // 16
        codes = encode_e2m1_stochastic(scaled.unflatten(1, (-1, 16)), block_random(seed, stream, rows, places)).flatten(1)
    return MXFP4Tensor(pack_nibbles(codes), scales, tuple(x.shape), square)


def mxfp4_dequantize(quantized: MXFP4Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[M, K'] as matrix products see it: transformed if it was transformed. Exact in bfloat16 but for scales at the ends of the range."""
    factors = decode_e8m0(quantized.scales)
    if quantized.square:
        factors = factors.repeat_interleave(BLOCK, 0)[: len(quantized.codes)]
    values = decode_e2m1(unpack_nibbles(quantized.codes)).unflatten(1, (-1, BLOCK))
    return (values * factors[:, :, None]).flatten(1).to(dtype)
