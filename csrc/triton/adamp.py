"""AdamP's two passes (see csrc/cpu/adamp.cpp) over many tensors in one launch for each width of rows.

A program treats one tile: some columns of some rows of one matrix. Nothing waits for the device, and no sum depends on the order in which
programs run.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES = 2048
"""Of a tile: 16 for each of the 128 threads of a program."""


@triton.jit
def _load_tile(layout, tiles, count, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of this program's tile: matrix, sets of sums, rows over all matrices and their mask [ROWS], offsets and mask [ROWS, COLUMNS]."""
    matrix = tl.load(tiles + 2 * tl.program_id(0))
    tile = tl.load(tiles + 2 * tl.program_id(0) + 1)
    rows = tl.load(layout + matrix)
    width = tl.load(layout + count + matrix)
    first_row = tl.load(layout + 2 * count + matrix)
    first_sum = tl.load(layout + 3 * count + matrix)
    if ALIGNED:
        width = tl.multiple_of(width, 4)
    across = tl.cdiv(width, COLUMNS)
    row = tile // across * ROWS + tl.arange(0, ROWS)
    column = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    offsets = row[:, None] * width + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < width)
    return matrix, first_sum + row * across + tile % across, first_row + row, row < rows, offsets, inside


@triton.jit
def _tensor(pointers, number, ALIGNED: tl.constexpr):
    pointer = tl.load(pointers + number).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _update(g, m, v, beta1, one_minus_beta1, eps, inverse_root, NESTEROV: tl.constexpr):
    numerator = m
    if NESTEROV:
        numerator = beta1 * m + one_minus_beta1 * g
    return tl.div_rn(numerator, tl.sqrt_rn(v) * inverse_root + eps)


@triton.jit
def _first_kernel(
    pointers,
    layout,
    tiles,
    sums,
    count,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    inverse_root,
    growth,
    slope,
    NESTEROV: tl.constexpr,
    CHANGE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Moments of one tile, the sums of its rows, and with CHANGE p <- p + growth p + slope u."""
    matrix, at, _, here, offsets, inside = _load_tile(layout, tiles, count, ALIGNED, ROWS, COLUMNS)
    p_tile = _tensor(pointers, matrix, ALIGNED) + offsets
    m_tile = _tensor(pointers, 2 * count + matrix, ALIGNED) + offsets
    v_tile = _tensor(pointers, 3 * count + matrix, ALIGNED) + offsets
    p = tl.load(p_tile, mask=inside, other=0.0)
    g = tl.load(_tensor(pointers, count + matrix, ALIGNED) + offsets, mask=inside, other=0.0)
    m = beta1 * tl.load(m_tile, mask=inside, other=0.0) + one_minus_beta1 * g
    # Outside of the matrix 1, so that nothing is divided by zero.
    v = beta2 * tl.load(v_tile, mask=inside, other=1.0) + one_minus_beta2 * (g * g)
    u = _update(g, m, v, beta1, one_minus_beta1, eps, inverse_root, NESTEROV)
    tl.store(m_tile, m, mask=inside)
    tl.store(v_tile, v, mask=inside)
    tl.store(sums + 4 * at, tl.sum(g * p, axis=1), mask=here)
    tl.store(sums + 4 * at + 1, tl.sum(g * g, axis=1), mask=here)
    tl.store(sums + 4 * at + 2, tl.sum(p * p, axis=1), mask=here)
    tl.store(sums + 4 * at + 3, tl.sum(p * u, axis=1), mask=here)
    if CHANGE:
        tl.store(p_tile, p + (growth * p + slope * u), mask=inside)


@triton.jit
def _second_kernel(
    pointers,
    layout,
    tiles,
    changes,
    count,
    beta1,
    one_minus_beta1,
    eps,
    inverse_root,
    NESTEROV: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """p <- p + growth p + slope u on one tile, with ``changes`` [all rows, 2] of growth and slope; nothing is read where both are 0."""
    matrix, _, row, here, offsets, inside = _load_tile(layout, tiles, count, ALIGNED, ROWS, COLUMNS)
    growth = tl.load(changes + 2 * row, mask=here, other=0.0)
    slope = tl.load(changes + 2 * row + 1, mask=here, other=0.0)
    changing = (growth != 0.0) | (slope != 0.0)
    if tl.sum(changing.to(tl.int32), axis=0) > 0:
        inside = inside & changing[:, None]
        p_tile = _tensor(pointers, matrix, ALIGNED) + offsets
        p = tl.load(p_tile, mask=inside, other=0.0)
        m = tl.load(_tensor(pointers, 2 * count + matrix, ALIGNED) + offsets, mask=inside, other=0.0)
        v = tl.load(_tensor(pointers, 3 * count + matrix, ALIGNED) + offsets, mask=inside, other=1.0)
        g = p
        if NESTEROV:
            g = tl.load(_tensor(pointers, count + matrix, ALIGNED) + offsets, mask=inside, other=0.0)
        u = _update(g, m, v, beta1, one_minus_beta1, eps, inverse_root, NESTEROV)
        tl.store(p_tile, p + (growth[:, None] * p + slope[:, None] * u), mask=inside)


class _Launch(NamedTuple):
    """Matrices of about one width."""

    tiles: Tensor
    """int64 [programs, 2]: matrix, and number of the tile in it."""
    rows: int
    """Of a tile."""
    columns: int
    """Of a tile, a power of two."""
    even: bool
    """All rows are multiples of 16 bytes."""


class _Layout(NamedTuple):
    """How matrices are cut. A row has one set of sums for each tile that it lies in."""

    matrices: Tensor
    """int64 [4, matrices]: rows, width, first row and first set of sums over all matrices."""
    sums: Tensor
    """int64 [all rows]: sets of sums of each row."""
    total: int
    """Sets of sums in all."""
    launches: tuple[_Launch, ...]


@lru_cache(maxsize=64)
def _layout(shapes: tuple[tuple[int, int], ...], device: torch.device) -> _Layout:
    """For matrices of ``shapes`` (rows, width)."""
    columns = [min(VALUES, triton.next_power_of_2(max(1, width))) for _, width in shapes]
    across = [triton.cdiv(width, size) for (_, width), size in zip(shapes, columns, strict=True)]
    rows, widths = (torch.tensor(values) for values in zip(*shapes, strict=True))
    sets = rows * torch.tensor(across)
    table = torch.stack([rows, widths, rows.cumsum(0) - rows, sets.cumsum(0) - sets])
    launches = []
    for size in sorted(set(columns)):
        members = [number for number, other in enumerate(columns) if other == size and shapes[number][0] * shapes[number][1]]
        if members:
            tiles = torch.cat([_tiles(number, triton.cdiv(shapes[number][0], VALUES // size) * across[number]) for number in members])
            launches.append(_Launch(tiles.to(device), VALUES // size, size, all(shapes[number][1] % 4 == 0 for number in members)))
    sets_a_row = torch.tensor(across).repeat_interleave(rows)
    return _Layout(table.to(device), sets_a_row.to(device), int(sets.sum()), tuple(launches))


def _tiles(matrix: int, count: int) -> Tensor:
    return torch.stack([torch.full((count,), matrix), torch.arange(count)], dim=1)


def _pointers(lists: Sequence[Sequence[Tensor]], device: torch.device) -> tuple[Tensor, bool]:
    """Addresses of p, g, m, v, int64 [4, tensors] on ``device``, and whether all are multiples of 16 bytes."""
    addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in lists]
    # Pinned, so that the copy does not wait for what the device is doing.
    table = torch.tensor(addresses, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    return table, all(address % 16 == 0 for addresses_ in addresses for address in addresses_)


def first_pass(
    lists: Sequence[Sequence[Tensor]], shapes: tuple[tuple[int, int], ...], betas: tuple[float, float], eps: float, inverse_root: float,
    nesterov: bool, growth: float, slope: float,
) -> Tensor:  # fmt: skip
    """Change the moments, and p too unless ``growth`` and ``slope`` are 0.

    Args:
        lists: p, g, m, v: contiguous float32 tensors on one device.
        shapes: rows and width of each tensor.
        betas: decay of the moments.
        eps: added to the root of v.
        inverse_root: 1 / sqrt(1 - beta2^steps).
        nesterov: see ``megatron_ext.kernels.adamp.AdamUpdate``.
        growth: p <- p + growth p + slope u.
        slope: the same.

    Returns:
        g.p, g.g, p.p and p.u of each row, of p before the change: [all rows, 4] float64.
    """
    device = lists[0][0].device
    layout = _layout(shapes, device)
    table, aligned = _pointers(lists, device)
    sums = torch.empty(layout.total, 4, dtype=torch.float32, device=device)
    numbers = (betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps, inverse_root, growth, slope)
    with torch.cuda.device_of(table):
        for tiles, rows, columns, even in layout.launches:
            flags = {
                "NESTEROV": nesterov,
                "CHANGE": growth != 0 or slope != 0,
                "ALIGNED": aligned and even,
                "ROWS": rows,
                "COLUMNS": columns,
            }
            _first_kernel[(len(tiles),)](table, layout.matrices, tiles, sums, len(shapes), *numbers, **flags)
    return torch.segment_reduce(sums.double(), "sum", lengths=layout.sums, unsafe=True, initial=0.0)


def second_pass(
    lists: Sequence[Sequence[Tensor]], shapes: tuple[tuple[int, int], ...], betas: tuple[float, float], eps: float, inverse_root: float,
    nesterov: bool, changes: Tensor,
) -> None:  # fmt: skip
    """p <- p + growth p + slope u with ``changes`` [all rows, 2] of growth and slope, any float; the rest as in ``first_pass``."""
    device = lists[0][0].device
    layout = _layout(shapes, device)
    table, aligned = _pointers(lists, device)
    numbers = (betas[0], 1 - betas[0], eps, inverse_root)
    changes = changes.float().contiguous()
    with torch.cuda.device_of(table):
        for tiles, rows, columns, even in layout.launches:
            flags = {"NESTEROV": nesterov, "ALIGNED": aligned and even, "ROWS": rows, "COLUMNS": columns}
            _second_kernel[(len(tiles),)](table, layout.matrices, tiles, changes, len(shapes), *numbers, **flags)
