"""What quantizers return: codes, scales, and how they are laid out. No arithmetic."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NVFP4Tensor:
    """A matrix [M, K] as E2M1 codes along K, an E4M3 scale for each block and one float32 scale, amax / (6 x 448), for the tensor.

    K is filled up with zeros to a multiple of 16, K'. The values are code x scale x amax / (6 x 448).

    The quantized columns of a matrix are an NVFP4Tensor of its transpose.
    """

    codes: Tensor
    """uint8 [M, K' / 2], two codes a byte, the even one in the low half."""
    scales: Tensor
    """float8_e4m3fn [M, K' / 16], or [ceil(M / 16), K' / 16] for blocks of 16 x 16."""
    amax: Tensor
    """float32 []: the largest magnitude that the scales provide for."""
    shape: tuple[int, int]
    """M, K."""
    block: tuple[int, int] = (1, 16)
    """Rows and columns that share a scale: (1, 16) or (16, 16)."""
    signs: Tensor | None = None
    """float32 [16] if the codes are of x transformed: every 16 neighbours of a row by H diag(signs) / 4 (a random Hadamard transform)."""

    def row_scales(self) -> Tensor:
        """float8_e4m3fn [M, K' / 16]: the scales of each row, those of 16 x 16 blocks repeated, as tensor cores take them."""
        if self.block == (1, 16):
            return self.scales
        return self.scales.view(torch.uint8).repeat_interleave(16, 0)[: self.shape[0]].view(torch.float8_e4m3fn)


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


@dataclass(frozen=True)
class FP8Tensor:
    """A matrix [M, K] as codes of 8 bits. The values are code x scale, the scale that of the value's block."""

    codes: Tensor
    """uint8 [M, K]."""
    scales: Tensor
    """float32, or float8_e8m0fnu for MXFP8; [ceil(M / block[0]), ceil(K / block[1])]."""
    amax: Tensor
    """float32, of the shape of ``scales``: the largest magnitudes that the scales provide for."""
    block: tuple[int, int]
    """Rows and columns that share a scale, (M, K) for one scale in all."""
    dtype: torch.dtype = torch.float8_e4m3fn
    """What the codes are: float8_e4m3fn or float8_e5m2."""

    @property
    def shape(self) -> tuple[int, int]:
        """M, K."""
        return self.codes.shape[0], self.codes.shape[1]
