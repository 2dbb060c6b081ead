"""Activations and gradients that ranks hand to one another as codes of 4 or 8 bits with a scale for every 32 (OCP MX 1.0)."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.kernels.fp8_quantize import fp8_dequantize, fp8_quantize
from megatron_ext.kernels.mxfp4_quantize import mxfp4_dequantize, mxfp4_quantize
from megatron_ext.kernels.quantized import FP8Tensor, MXFP4Tensor
from megatron_ext.precision.state import PrecisionState

BLOCK = 32
WireFormat = Literal["mxfp8", "mxfp4"]


@dataclass(frozen=True)
class Wire:
    """How rows of numbers become rows of bytes, and back.

    A row is coded by itself, so that it is the same numbers whoever codes it, and where nothing is sent too. What ranks add up is never
    coded: its rounding would depend on how many they are.
    """

    format: WireFormat
    state: PrecisionState
    """Of the model. After the late switch nothing is coded."""

    @property
    def codes(self) -> bool:
        """Whether anything is coded now."""
        return not self.state.switched

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of ``width`` numbers: its codes and an E8M0 scale for every 32."""
        blocks = -(-width // BLOCK)
        return (width if self.format == "mxfp8" else blocks * BLOCK // 2) + blocks

    def encode(self, x: Tensor) -> Tensor:
        """Bytes uint8 [..., ``row_bytes(n)``] of ``x`` [..., n], a floating-point type."""
        rows = x.flatten(0, -2)
        rows = rows if rows.dtype in (torch.float32, torch.bfloat16) else rows.float()
        if self.format == "mxfp8":
            fp8 = fp8_quantize(rows, scaling="mx")
            parts = [fp8.codes, fp8.scales.view(torch.uint8)]
        else:
            fp4 = mxfp4_quantize(rows)
            parts = [fp4.codes, fp4.scales.view(torch.uint8)]
        return torch.cat(parts, dim=1).unflatten(0, x.shape[:-1])

    def decode(self, coded: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """The numbers [..., width] that ``encode`` made bytes of, in ``dtype``."""
        rows = coded.flatten(0, -2)
        codes, scales = rows.split([rows.shape[1] - -(-width // BLOCK), -(-width // BLOCK)], dim=1)
        wide = dtype if dtype == torch.bfloat16 else torch.float32
        if self.format == "mxfp8":
            scales = scales.contiguous().view(torch.float8_e8m0fnu)
            values = fp8_dequantize(FP8Tensor(codes, scales, torch.empty(0), (1, BLOCK)), wide)
        else:
            values = mxfp4_dequantize(MXFP4Tensor(codes, scales, (len(rows), width)), wide)[:, :width]
        return values.to(dtype).unflatten(0, coded.shape[:-1])

    def rounded(self, x: Tensor) -> Tensor:
        """``x`` as it would be after it had been sent."""
        return self.decode(self.encode(x), x.shape[-1], x.dtype)


def rounded_forward(x: Tensor, wire: Wire | None) -> Tensor:
    """What arrives of ``x`` where it is sent in the forward pass; its gradient passes as it is."""
    return _RoundForward.apply(x, wire) if wire is not None and wire.codes else x


def rounded_backward(x: Tensor, wire: Wire | None) -> Tensor:
    """``x`` as it is; of its gradient, what arrives where that is sent."""
    return _RoundBackward.apply(x, wire) if wire is not None and wire.codes else x


class _RoundForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire) -> Tensor:
        return wire.rounded(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _RoundBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire) -> Tensor:
        ctx.wire = wire
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.wire.rounded(grad), None
