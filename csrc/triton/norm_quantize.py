"""RMSNorm and SSNorm whose result is quantized in registers: to FP8 (E4M3) in blocks of 1 x 128, or to NVFP4 in blocks of 1 x 16.

Rounds with integers, as the interpreter and every GPU can, in the arithmetic of csrc/common/fp8.h and nvfp4.h.
"""

import triton
import triton.language as tl
from torch import Tensor

from megatron_ext.csrc.triton.norm import INTERPRETED, normalized_tile, tile_of

LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
INFINITE = tl.constexpr(0x7F800000)


@triton.jit
def _finite(x):
    """min(x, the largest float), which is that float for NaN."""
    return tl.where(x < LARGEST_FLOAT, x, LARGEST_FLOAT)


@triton.jit
def _largest(y):
    """Largest magnitude along the last dimension; NaN if there is one, as bits order."""
    return tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2).to(tl.float32, bitcast=True)


@triton.jit
def _e4m3(x):
    """Codes as int32, to nearest, ties to even, saturated; NaN is 0x7f."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # 16384 has the spacing of the subnormal codes, so that adding it rounds.
    subnormal = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(magnitude < 0x3C800000, subnormal, normal) | ((bits >> 24) & 0x80)
    return tl.where((bits & 0x7FFFFFFF) > INFINITE, 0x7F, code)


@triton.jit
def _e2m1(x):
    """The same of 4 bits; NaN is 7."""
    a = tl.abs(x)
    steps = (a > 0.25).to(tl.int32) + (a >= 0.75) + (a > 1.25) + (a >= 1.75) + (a > 2.5) + (a >= 3.5) + (a > 5.0)
    return tl.where(x == x, steps | ((x.to(tl.int32, bitcast=True) >> 28) & 8), 7)


@triton.jit
def _normalized_blocks(
    x, residual, weight, total, row, here, column, width, x_stride, residual_stride, eps,
    DTYPE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ONE_GAIN: tl.constexpr, BLOCK: tl.constexpr, BY_BITS: tl.constexpr,
):  # fmt: skip
    """y [rows, blocks, BLOCK], zeros outside."""
    y, _ = normalized_tile(
        x, residual, weight, total, row, here, column, width, x_stride, residual_stride, eps, DTYPE, HAS_RESIDUAL, ONE_GAIN, BY_BITS
    )
    # Not before: in a row of NaN, what is outside has become NaN too.
    y = tl.where((column < width)[None, :], y, 0.0)
    return y.reshape(row.shape[0], column.shape[0] // BLOCK, BLOCK)


@triton.jit
def _fp8_kernel(
    x, residual, weight, total, codes, scales, amax, rows, width, x_stride, residual_stride, eps,
    POWER_OF_TWO: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ONE_GAIN: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BY_BITS: tl.constexpr,
):  # fmt: skip
    row, column = (tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)).to(tl.int64), tl.arange(0, WIDTH)
    here = row < rows
    DTYPE: tl.constexpr = x.dtype.element_ty
    y = _normalized_blocks(
        x, residual, weight, total, row, here, column, width, x_stride, residual_stride, eps, DTYPE, HAS_RESIDUAL, ONE_GAIN, 128, BY_BITS
    )
    largest = _largest(y)
    usable = (largest > 0) & (largest <= LARGEST_FLOAT)
    factor = _finite(tl.div_rn(448.0, tl.where(usable, largest, 448.0)))
    if POWER_OF_TWO:
        factor = (factor.to(tl.int32, bitcast=True) & INFINITE).to(tl.float32, bitcast=True)
    scale = tl.where(largest.to(tl.int32, bitcast=True) >= INFINITE, largest, tl.div_rn(1.0, factor))
    code = _e4m3(y * factor[:, :, None]).reshape(HEIGHT, WIDTH)
    tl.store(codes + row[:, None] * width + column[None, :], code.to(tl.uint8), mask=here[:, None] & (column < width)[None, :])
    block, across = tl.arange(0, WIDTH // 128), tl.cdiv(width, 128)
    at, mask = row[:, None] * across + block[None, :], here[:, None] & (block < across)[None, :]
    tl.store(scales + at, scale, mask=mask)
    tl.store(amax + at, largest, mask=mask)


@triton.jit
def _nvfp4_kernel(
    x, residual, weight, total, codes, scales, amax, rows, width, x_stride, residual_stride, eps,
    POWER_OF_TWO: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ONE_GAIN: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BY_BITS: tl.constexpr,
):  # fmt: skip
    row, column = (tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)).to(tl.int64), tl.arange(0, WIDTH)
    here = row < rows
    DTYPE: tl.constexpr = x.dtype.element_ty
    y = _normalized_blocks(
        x, residual, weight, total, row, here, column, width, x_stride, residual_stride, eps, DTYPE, HAS_RESIDUAL, ONE_GAIN, 16, BY_BITS
    )
    tensor_amax = tl.load(amax)
    tensor_scale = _finite(tl.div_rn(2688.0, tensor_amax))
    tensor_scale = tl.where((tensor_amax == 0) | (tensor_scale == 0), 1.0, tensor_scale)
    scale = _e4m3(_finite(_largest(y) * (tensor_scale * (1.0 / 6.0))))
    # The bits of a code, moved to where those of a float32 are, are 2^-120 times its number.
    decoded = (scale << 20).to(tl.float32, bitcast=True) * 2.0**120
    factor = _finite(tl.div_rn(1.0, decoded * tl.div_rn(1.0, tensor_scale)))
    even, odd = tl.split(_e2m1(y * factor[:, :, None]).reshape(HEIGHT, WIDTH // 2, 2))
    block, across = tl.arange(0, WIDTH // 16), tl.cdiv(width, 16)
    byte = tl.arange(0, WIDTH // 2)
    at, mask = row[:, None] * (8 * across) + byte[None, :], here[:, None] & (byte < 8 * across)[None, :]
    tl.store(codes + at, (even | (odd << 4)).to(tl.uint8), mask=mask)
    tl.store(scales + row[:, None] * across + block[None, :], scale.to(tl.uint8), mask=here[:, None] & (block < across)[None, :])


def normalize_and_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, outputs: list[Tensor], amax: Tensor | None, power_of_two: bool
) -> None:
    """Fill ``outputs``: codes, scales, amax of blocks (unless ``amax`` is given: NVFP4), x + residual; see ``kernels.norm_quantize``."""
    height, width, warps = tile_of(x, 128)
    codes, scales, found, *sums = outputs
    kernel = _fp8_kernel if amax is None else _nvfp4_kernel
    if len(x):
        kernel[(triton.cdiv(len(x), height),)](
            x,
            x if residual is None else residual,
            weight.float().contiguous(),
            sums[0] if sums else x,
            codes,
            scales,
            found if amax is None else amax,
            *x.shape,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            eps,
            POWER_OF_TWO=power_of_two,
            HAS_RESIDUAL=residual is not None,
            ONE_GAIN=weight.numel() == 1,
            HEIGHT=height,
            WIDTH=width,
            BY_BITS=INTERPRETED,
            num_warps=warps,
            enable_fp_fusion=False,
        )
