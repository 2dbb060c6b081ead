"""RMSNorm and SSNorm: forward, and backward with the weight's gradient summed in registers.

Rows are read once: a tile holds whole rows.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ext.errors import ConfigError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PROGRAMS = 512
"""Sums of which the gradient of the weight is made, whatever the GPU: four for each processor of the largest, so that all have work."""
TILE = 2048
"""Values of a tile, of rows that are not longer."""
LONGEST = 65536
"""Values of a row that registers hold."""


@triton.jit
def _rounded(x, DTYPE: tl.constexpr, BY_BITS: tl.constexpr):
    """x as DTYPE holds it, in float32. The interpreter makes bfloat16 by cutting off bits, so that there they are rounded before."""
    if DTYPE == tl.float32:
        return x
    if not BY_BITS:
        return x.to(DTYPE).to(tl.float32)
    bits = x.to(tl.uint32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)


@triton.jit
def _weights(weight, column, inside, ONE_GAIN: tl.constexpr):
    return tl.load(weight) if ONE_GAIN else tl.load(weight + column, mask=inside, other=0.0)[None, :]


@triton.jit
def normalized_tile(
    x,
    residual,
    weight,
    total,
    row,
    here,
    column,
    width,
    x_stride,
    residual_stride,
    eps,
    DTYPE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ONE_GAIN: tl.constexpr,
    BY_BITS: tl.constexpr,
):
    """Rows ``row`` (int64) of y in float32, rounded to DTYPE, and 1 / rms of each; x + residual goes to ``total``."""
    inside = column < width
    mask = here[:, None] & inside[None, :]
    values = tl.load(x + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        values += tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        values = _rounded(values, DTYPE, BY_BITS)
        tl.store(total + row[:, None] * width + column[None, :], values.to(DTYPE), mask=mask)
    mean = tl.div_rn(tl.sum(values * values, 1), width.to(tl.float32))
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    result = _rounded(values * inverse[:, None], DTYPE, BY_BITS) * _weights(weight, column, inside, ONE_GAIN)
    return _rounded(result, DTYPE, BY_BITS), inverse


@triton.jit
def _normalize_kernel(
    x,
    residual,
    weight,
    y,
    total,
    inverse_rms,
    rows,
    width,
    x_stride,
    residual_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    ONE_GAIN: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BY_BITS: tl.constexpr,
):
    row, column = (tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)).to(tl.int64), tl.arange(0, WIDTH)
    here = row < rows
    DTYPE: tl.constexpr = y.dtype.element_ty
    result, inverse = normalized_tile(
        x, residual, weight, total, row, here, column, width, x_stride, residual_stride, eps, DTYPE, HAS_RESIDUAL, ONE_GAIN, BY_BITS
    )
    tl.store(inverse_rms + row, inverse, mask=here)
    tl.store(y + row[:, None] * width + column[None, :], result.to(DTYPE), mask=here[:, None] & (column < width)[None, :])


@triton.jit
def _differentiate_kernel(
    x,
    grad,
    grad_sum,
    weight,
    inverse_rms,
    grad_x,
    parts,
    rows,
    width,
    x_stride,
    grad_stride,
    grad_sum_stride,
    tiles,
    HAS_GRAD_SUM: tl.constexpr,
    ONE_GAIN: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BY_BITS: tl.constexpr,
):
    """``tiles`` tiles, one after another; ``parts`` [programs, width], of one gain [programs], are sums of the weight's gradient."""
    column = tl.arange(0, WIDTH)
    inside = column < width
    DTYPE: tl.constexpr = grad_x.dtype.element_ty
    weights = _weights(weight, column, inside, ONE_GAIN)
    of_rows, of_channels = tl.zeros((HEIGHT,), tl.float32), tl.zeros((HEIGHT, 1 if ONE_GAIN else WIDTH), tl.float32)
    for tile in range(tiles):
        row = (tl.program_id(0) * tiles + tile) * HEIGHT + tl.arange(0, HEIGHT)
        here = row < rows
        mask, row = here[:, None] & inside[None, :], row.to(tl.int64)
        values = tl.load(x + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        grads = tl.load(grad + row[:, None] * grad_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_rms + row, mask=here, other=0.0)
        normalized = values * inverse[:, None]
        if ONE_GAIN:
            along = tl.sum(grads * normalized, 1)
            of_rows += along
            along *= weights
        else:
            along = tl.sum(grads * normalized * weights, 1)
            if WITH_WEIGHT:
                of_channels += grads * normalized
        slope = tl.div_rn(along, width.to(tl.float32))
        result = (grads * weights - normalized * slope[:, None]) * inverse[:, None]
        if HAS_GRAD_SUM:
            result += tl.load(grad_sum + row[:, None] * grad_sum_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x + row[:, None] * width + column[None, :], _rounded(result, DTYPE, BY_BITS).to(DTYPE), mask=mask)
    if WITH_WEIGHT:
        if ONE_GAIN:
            tl.store(parts + tl.program_id(0), tl.sum(of_rows, 0))
        else:
            tl.store(parts + tl.program_id(0).to(tl.int64) * width + column, tl.sum(of_channels, 0), mask=inside)


def normalize(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> list[Tensor]:
    """[y, 1 / rms [rows] float32, x + residual where there is one] of ``x`` [rows, n]; see ``megatron_ext.kernels.norm``."""
    outputs = [x.new_empty(x.shape), x.new_empty(len(x), dtype=torch.float32), *([] if residual is None else [x.new_empty(x.shape)])]
    height, width, warps = tile_of(x)
    if len(x):
        _normalize_kernel[(triton.cdiv(len(x), height),)](
            x,
            x if residual is None else residual,
            weight.float().contiguous(),
            outputs[0],
            outputs[0] if residual is None else outputs[2],
            outputs[1],
            *x.shape,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            eps,
            HAS_RESIDUAL=residual is not None,
            ONE_GAIN=weight.numel() == 1,
            HEIGHT=height,
            WIDTH=width,
            BY_BITS=INTERPRETED,
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return outputs


def differentiate(x: Tensor, grad: Tensor, grad_sum: Tensor | None, weight: Tensor, inverse_rms: Tensor, with_weight: bool) -> list[Tensor]:
    """[gradient of x, that of the weight [n] or [1] float32 if it is wanted]; ``x``, ``grad``, ``grad_sum`` [rows, n]."""
    one_gain, grad_x = weight.numel() == 1, x.new_empty(x.shape)
    height, width, warps = tile_of(x)
    tiles = triton.cdiv(triton.cdiv(len(x), height), PROGRAMS)
    programs = triton.cdiv(len(x), height * tiles) if tiles else 0
    parts = x.new_empty(programs, 1 if one_gain else x.shape[1], dtype=torch.float32) if with_weight else inverse_rms
    if programs:
        _differentiate_kernel[(programs,)](
            x,
            grad,
            grad if grad_sum is None else grad_sum,
            weight.float().contiguous(),
            inverse_rms,
            grad_x,
            parts,
            *x.shape,
            x.stride(0),
            grad.stride(0),
            0 if grad_sum is None else grad_sum.stride(0),
            tiles,
            HAS_GRAD_SUM=grad_sum is not None,
            ONE_GAIN=one_gain,
            WITH_WEIGHT=with_weight,
            HEIGHT=height,
            WIDTH=width,
            BY_BITS=INTERPRETED,
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return [grad_x, parts.sum(0)] if with_weight else [grad_x]


def tile_of(x: Tensor, least: int = 1) -> tuple[int, int, int]:
    """Rows of a tile, their length as a power of two of at least ``least``, and warps. Raises ConfigError for rows over ``LONGEST``."""
    width = max(least, triton.next_power_of_2(x.shape[1]))
    if width > LONGEST:
        raise ConfigError(f"norm backend is 'triton' for rows of {x.shape[1]}; accepted are up to {LONGEST}, and by 'torch' any")
    return max(1, TILE // width), width, min(16, max(4, width // 512))
