"""Number formats of low-precision training: what a value, a scale and a block of them are.

Elements are described here, the arithmetic is in ``kernels``: what these tables say, its definitions compute.
Sources: OCP 8-bit floating point specification 1.0, OCP microscaling formats (MX) 1.0, NVIDIA 2025 (arXiv:2509.25149) for NVFP4.
"""

from dataclasses import dataclass

import torch

from megatron_ext.kernels.quantized import FP8Tensor, NVFP4Tensor

__all__ = ["E2M1", "E4M3", "E5M2", "E8M0", "FORMATS", "BlockFormat", "FP8Tensor", "NVFP4Tensor", "NumberFormat"]


@dataclass(frozen=True)
class NumberFormat:
    """A floating-point number of at most 8 bits."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    largest: float
    """Finite."""
    smallest: float
    """Greater than zero, subnormal where the format has subnormals."""
    dtype: torch.dtype
    """PyTorch's; of two numbers for E2M1."""
    signed: bool = True

    @property
    def bits(self) -> int:
        """Of one number."""
        return self.signed + self.exponent_bits + self.mantissa_bits


E2M1 = NumberFormat("e2m1", 2, 1, 1, 6.0, 0.5, torch.float4_e2m1fn_x2)
E4M3 = NumberFormat("e4m3", 4, 3, 7, 448.0, 2.0**-9, torch.float8_e4m3fn)
E5M2 = NumberFormat("e5m2", 5, 2, 15, 57344.0, 2.0**-16, torch.float8_e5m2)
E8M0 = NumberFormat("e8m0", 8, 0, 127, 2.0**127, 2.0**-127, torch.float8_e8m0fnu, signed=False)


@dataclass(frozen=True)
class BlockFormat:
    """Elements and the scales that blocks of them share."""

    name: str
    element: NumberFormat
    block: tuple[int | None, int | None]
    """Rows and columns of a block; None: all of them."""
    scale: NumberFormat | None
    """None: float32."""
    tensor_scale: bool = False
    """Whether a float32 scale of the whole tensor comes on top."""

    @property
    def multiple(self) -> int:
        """What the dimension that a matrix product sums over has to be a multiple of, so that no block is cut."""
        return self.block[1] or 1

    @property
    def bits_per_value(self) -> float:
        """With scales; of those of rows and tensors nothing, as they depend on the size."""
        rows, columns = self.block
        shared = rows * columns if rows and columns else 0
        return self.element.bits + ((self.scale.bits if self.scale else 32) / shared if shared else 0.0)


FORMATS = {
    each.name: each
    for each in (
        BlockFormat("nvfp4", E2M1, (1, 16), E4M3, tensor_scale=True),
        BlockFormat("nvfp4_2d", E2M1, (16, 16), E4M3, tensor_scale=True),
        BlockFormat("mxfp4", E2M1, (1, 32), E8M0),
        BlockFormat("mxfp8", E4M3, (1, 32), E8M0),
        BlockFormat("fp8_tensorwise", E4M3, (None, None), None),
        BlockFormat("fp8_rowwise", E4M3, (1, None), None),
        BlockFormat("fp8_1x128", E4M3, (1, 128), None),
        BlockFormat("fp8_128x128", E4M3, (128, 128), None),
    )
}
"""By name."""
