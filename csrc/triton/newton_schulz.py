"""Products of matrices whose result is known to be symmetric: tiles on and below the diagonal are computed, the others mirrored.

Newton-Schulz consists of them: X X^T, the fused b A + c A A, and all products of polynomials of one symmetric matrix.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _symmetric_kernel(
    x,
    y,
    c,
    out,
    rows,
    inner,
    x_batch,
    x_row,
    x_column,
    y_batch,
    y_row,
    y_column,
    c_batch,
    c_row,
    c_column,
    out_batch,
    alpha,
    beta,
    HAS_C: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One TILE x TILE tile of out = alpha x y + beta c for x [rows, inner], y [inner, rows]; ``out`` has contiguous rows."""
    tile_row, tile_column = tl.program_id(0), tl.program_id(1)
    # Symmetry gives the tiles above the diagonal; their programs end here.
    if tile_column > tile_row:
        return
    batch = tl.program_id(2).to(tl.int64)
    row = tile_row * TILE + tl.arange(0, TILE)
    column = tile_column * TILE + tl.arange(0, TILE)
    depth = tl.arange(0, DEPTH)
    x_rows = x + batch * x_batch + row.to(tl.int64)[:, None] * x_row
    y_columns = y + batch * y_batch + column.to(tl.int64)[None, :] * y_column
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, inner, DEPTH):
        k = (start + depth).to(tl.int64)
        left = tl.load(x_rows + k[None, :] * x_column, mask=(row[:, None] < rows) & (k[None, :] < inner), other=0.0)
        right = tl.load(y_columns + k[:, None] * y_row, mask=(k[:, None] < inner) & (column[None, :] < rows), other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    total *= alpha
    inside = (row[:, None] < rows) & (column[None, :] < rows)
    row, column = row.to(tl.int64), column.to(tl.int64)
    if HAS_C:
        added = tl.load(c + batch * c_batch + row[:, None] * c_row + column[None, :] * c_column, mask=inside, other=0.0)
        total += beta * added.to(tl.float32)
    result = total.to(out.dtype.element_ty)
    out += batch * out_batch
    # Of a tile on the diagonal too only this half counts, so that the result is symmetric to the bit.
    here = row[:, None] >= column[None, :]
    tl.store(out + row[:, None] * rows + column[None, :], result, mask=inside & here)
    there = row[:, None] > column[None, :]
    tl.store(out + column[:, None] * rows + row[None, :], tl.trans(result), mask=tl.trans(inside & there))


def symmetric_product(X: Tensor, Y: Tensor, C: Tensor | None, alpha: float, beta: float) -> Tensor:
    """alpha X Y + beta C, of which X Y and C are symmetric.

    ``X`` [m, k] and ``Y`` [k, m] of one dtype (float32, bfloat16, float16) and any strides, ``C`` [m, m] or None; or stacks [batch, ...] of
    them. Sums in float32, rounded once. Returns a new [m, m] or [batch, m, m] in the dtype of ``X``.
    """
    stacked = [None if part is None else part.reshape(-1, *part.shape[-2:]) if part.ndim != 3 else part for part in (X, Y, C)]
    x, y, c = stacked
    batch, rows, inner = x.shape
    out = torch.empty(batch, rows, rows, dtype=X.dtype, device=X.device)
    c_or_any = out if c is None else c
    tile = 64 if X.dtype == torch.float32 or rows <= 512 else 128
    tiles = triton.cdiv(rows, tile)
    _symmetric_kernel[(tiles, tiles, batch)](
        x,
        y,
        c_or_any,
        out,
        rows,
        inner,
        *x.stride(),
        *y.stride(),
        *c_or_any.stride(),
        out.stride(0),
        alpha,
        beta,
        HAS_C=c is not None,
        TILE=tile,
        DEPTH=32 if X.dtype == torch.float32 else 64,
        num_warps=8 if tile == 128 else 4,
        num_stages=3,
    )
    return out.reshape(*X.shape[:-2], rows, rows)
