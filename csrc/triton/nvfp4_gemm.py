"""Products of NVFP4 matrices that are decoded in registers, for tensor cores that know bfloat16 and not NVFP4."""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ext.kernels.quantized import NVFP4Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SCALE_STEP = tl.constexpr(2.0**119)
SUM_SCALE = tl.constexpr(2.0**16)


@triton.jit
def _scale(code):
    """2^118 times the E4M3 number of a code without sign: its bits, moved to where those of a float32 are, are 2^-120 times the number."""
    return (code.to(tl.int32) << 20).to(tl.float32, bitcast=True) * SCALE_STEP * SCALE_STEP


@triton.jit
def _number(code):
    """2^-126 times the E2M1 number of a code 0...15, found in the same way, subnormals included."""
    return (((code & 7) << 22) | ((code & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def _values(codes, scales, row, rows, start, width, SCALE_ROWS: tl.constexpr, BYTES: tl.constexpr, OPERAND: tl.constexpr):
    """Of the bytes ``start`` ... of some rows: 2^-8 times the values of their low and of their high halves, exact in bfloat16."""
    byte, block = start + tl.arange(0, BYTES), start // 8 + tl.arange(0, BYTES // 8)
    inside = row[:, None] < rows
    code = tl.load(codes + row.to(tl.int64)[:, None] * width + byte[None, :], mask=inside & (byte[None, :] < width), other=0).to(tl.int32)
    scale_row = (row // SCALE_ROWS).to(tl.int64) * (width // 8)
    scale = _scale(tl.load(scales + scale_row[:, None] + block[None, :], mask=inside & (block[None, :] < width // 8), other=0))
    scale = tl.broadcast_to(scale[:, :, None], (row.shape[0], BYTES // 8, 8)).reshape(row.shape[0], BYTES)
    return (_number(code & 15) * scale).to(OPERAND), (_number(code >> 4) * scale).to(OPERAND)


@triton.jit
def _product_kernel(
    a_codes,
    a_scales,
    b_codes,
    b_scales,
    alpha,
    out,
    rows,
    columns,
    width,
    A_SCALE_ROWS: tl.constexpr,
    B_SCALE_ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    BYTES: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """One tile of out = alpha a b^T. The order of K does not matter, so the low halves of bytes are multiplied together, then the high."""
    row_tiles = tl.cdiv(rows, TILE_ROWS)
    row = tl.program_id(0) % row_tiles * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.program_id(0) // row_tiles * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    total = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.float32)
    for start in range(0, width, BYTES):
        a_low, a_high = _values(a_codes, a_scales, row, rows, start, width, A_SCALE_ROWS, BYTES, OPERAND)
        b_low, b_high = _values(b_codes, b_scales, column, columns, start, width, B_SCALE_ROWS, BYTES, OPERAND)
        total = tl.dot(a_low, b_low.T, total, input_precision="ieee")
        total = tl.dot(a_high, b_high.T, total, input_precision="ieee")
    result = (total * SUM_SCALE * tl.load(alpha)).to(out.dtype.element_ty)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tl.store(out + row.to(tl.int64)[:, None] * columns + column[None, :], result, mask=inside)


def nvfp4_product(a: NVFP4Tensor, b: NVFP4Tensor, alpha: Tensor, out_dtype: torch.dtype) -> Tensor:
    """alpha a b^T [M, N] without the tensor scales of ``a`` [M, K] and ``b`` [N, K]; ``alpha`` is float32 [] on their device.

    Sums are float32; so are the operands in the interpreter, which multiplies bfloat16 as if it were integers.
    """
    rows, columns, width = a.shape[0], b.shape[0], a.codes.shape[1]
    # The interpreter rounds to bfloat16 by cutting off bits, so that there PyTorch does it.
    out = torch.empty(rows, columns, dtype=torch.float32 if INTERPRETED else out_dtype, device=a.codes.device)
    tile_rows, tile_columns = tiles(rows, columns)
    operands = [part.contiguous() for x in (a, b) for part in (x.codes, x.scales.view(torch.uint8))]
    _product_kernel[(triton.cdiv(rows, tile_rows) * triton.cdiv(columns, tile_columns),)](
        *operands,
        alpha,
        out,
        rows,
        columns,
        width,
        A_SCALE_ROWS=a.block[0],
        B_SCALE_ROWS=b.block[0],
        TILE_ROWS=tile_rows,
        TILE_COLUMNS=tile_columns,
        BYTES=64,
        OPERAND=tl.float32 if INTERPRETED else tl.bfloat16,
        num_warps=8 if tile_rows * tile_columns >= 128 * 64 else 4,
        num_stages=3,
        enable_fp_fusion=False,
    )
    return out.to(out_dtype)


def tiles(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a tile: 128 x 128, and for few rows or columns all of these by 64, so that there are tiles for all processors."""
    few, many = (min(128, max(16, triton.next_power_of_2(size))) for size in sorted((rows, columns)))
    many = many if min(rows, columns) > 128 else min(many, 64)
    return (few, many) if rows <= columns else (many, few)
