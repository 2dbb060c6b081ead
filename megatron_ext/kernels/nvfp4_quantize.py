"""NVFP4 (NVIDIA 2025, arXiv:2509.25149, appendix B) with the arithmetic of TransformerEngine; backend ``torch`` is the definition.

A block of zeros, or one too small for E4M3, has scale 0. Infinity and NaN make the amax infinite or NaN, and so everything that is
dequantized, unless an amax is given: then infinity is as the largest number, NaN as +6. No scale is ever NaN.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels import native
from megatron_ext.kernels.amax import amax_both, rotated
from megatron_ext.kernels.hadamard import hadamard_transform
from megatron_ext.kernels.minifloat import (
    LARGEST_FLOAT,
    decode_e2m1,
    encode_e2m1,
    encode_e2m1_stochastic,
    encode_fp8,
    pack_nibbles,
    unpack_nibbles,
)
from megatron_ext.kernels.philox import block_random
from megatron_ext.kernels.quantized import NVFP4Tensor

BLOCKS = ((1, 16), (16, 16))
ROUNDINGS = ("nearest", "stochastic")
ROW_STREAM, COLUMN_STREAM = 0, 1
"""Random bits of the rows and of the columns of a matrix."""


def nvfp4_quantize(
    x: Tensor,
    *,
    block: tuple[int, int] = (1, 16),
    rounding: str = "nearest",
    amax: Tensor | None = None,
    seed: int | None = None,
    signs: Tensor | None = None,
    offset: tuple[int, int] = (0, 0),
    backend: str = "auto",
    threads: int | None = None,
) -> NVFP4Tensor:
    """Quantize the rows of a matrix.

    Args:
        x: [M, K] float32 or bfloat16, of any size; K is filled up with zeros to a multiple of 16.
        block: rows and columns that share a scale, (1, 16) or (16, 16).
        rounding: "nearest" (ties to even), or "stochastic": up with the probability of the distance to the number below, in steps of 1/256.
        amax: float32 [], of the whole tensor where ``x`` is a part of it; None: of ``x``.
        seed: 64 bits that stochastic rounding takes its random numbers from, with the place of a block in the whole tensor.
        signs: [16] of +-1: transform every 16 neighbours of a row first (random Hadamard transform, rounded to the type of ``x``).
        offset: row and column of ``x`` in the whole tensor; multiples of 16 where blocks would be cut otherwise.
        backend: as in ``native.select_backend``.
        threads: of the CPU; None: as many as PyTorch uses. No bit depends on it.

    Returns:
        Codes, scales and amax of ``x``.

    Raises:
        ConfigError: an argument is none of the above, or the backend cannot run.
    """
    amaxes = (amax, None)
    return _quantize(x, (True, False), block, rounding, amaxes, seed, (signs, None), offset, backend, threads)[0]


def nvfp4_quantize_both(
    x: Tensor,
    *,
    block: tuple[int, int] = (1, 16),
    rounding: str = "nearest",
    amax: Tensor | None = None,
    column_amax: Tensor | None = None,
    seed: int | None = None,
    column_signs: Tensor | None = None,
    offset: tuple[int, int] = (0, 0),
    backend: str = "auto",
    threads: int | None = None,
) -> tuple[NVFP4Tensor, NVFP4Tensor]:
    """Quantize the rows and the columns of a matrix in one read of it.

    Arguments as of ``nvfp4_quantize``. The columns are ``nvfp4_quantize(x.T, amax=column_amax, signs=column_signs)``, an NVFP4Tensor of x^T
    with other random numbers for stochastic rounding. For blocks of 16 x 16 they have the codes of the rows, and no signs.
    """
    amaxes, signs = (amax, column_amax), (None, column_signs)
    return _quantize(x, (True, True), block, rounding, amaxes, seed, signs, offset, backend, threads)


def nvfp4_dequantize(
    quantized: NVFP4Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    undo_transform: bool = True,
    backend: str = "auto",
    threads: int | None = None,
) -> Tensor:
    """The matrix [M, K] that the codes stand for, in float32 or bfloat16.

    Of a transformed matrix, the transform is undone; with ``undo_transform=False`` it is [M, K'] as matrix products see it.
    Raises ConfigError for another type and for a backend that cannot run.
    """
    if dtype not in native.TYPES:
        raise ConfigError(f"NVFP4 dequantized to {dtype}; accepted are {', '.join(map(str, native.TYPES))}")
    name, _ = native.select_backend(backend, quantized.codes.device)
    undo = quantized.signs is not None and undo_transform
    inner = torch.float32 if undo else dtype
    arguments = (quantized.codes.contiguous(), quantized.scales.view(torch.uint8).contiguous(), quantized.amax, quantized.block[0])
    x = _dequantized(*arguments).to(inner) if name == "torch" else _dequantize_compiled(*arguments, inner, name, threads or 0)
    if undo:
        x = (hadamard_transform(x, 0.25, block=16, backend=backend).unflatten(1, (-1, 16)) * quantized.signs).flatten(1).to(dtype)
    return x if quantized.signs is not None and not undo else x[:, : quantized.shape[1]]


def _quantize(
    x: Tensor,
    wanted: tuple[bool, bool],
    block: tuple[int, int],
    rounding: str,
    amaxes: Sequence[Tensor | None],
    seed: int | None,
    signs: Sequence[Tensor | None],
    offset: tuple[int, int],
    backend: str,
    threads: int | None,
) -> tuple[NVFP4Tensor, ...]:
    """Rows and columns, those of them that are ``wanted``."""
    _check(x, wanted, tuple(block), rounding, seed, signs, offset)
    square, stochastic = tuple(block) == (16, 16), rounding == "stochastic"
    name, _ = native.select_backend(backend, x.device)
    threads = threads or 0
    x = x.contiguous()
    signs = [None if each is None else each.to(x.device, torch.float32).contiguous() for each in signs]
    amaxes = _filled_in(x, wanted, amaxes, signs, square, name, threads)
    compute = _definition if name == "torch" else _compiled
    parts = compute(x, *wanted, *amaxes, square, stochastic, seed or 0, *offset, *signs, name, threads)
    outputs = []
    for index, (shape, each_amax, each_signs) in enumerate(zip((x.shape, x.mT.shape), amaxes, signs, strict=True)):
        if wanted[index]:
            codes, scales = parts[2 * index : 2 * index + 2]
            outputs.append(NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), each_amax, tuple(shape), tuple(block), each_signs))
    return tuple(outputs)


def _check(
    x: Tensor,
    wanted: tuple[bool, bool],
    block: tuple[int, int],
    rounding: str,
    seed: int | None,
    signs: Sequence[Tensor | None],
    offset: tuple[int, int],
) -> None:
    native.check_matrix(x, "NVFP4")
    if block not in BLOCKS:
        raise ConfigError(f"NVFP4 block is {block}; accepted are {', '.join(map(str, BLOCKS))}")
    if rounding not in ROUNDINGS:
        raise ConfigError(f"NVFP4 rounding is {rounding!r}; accepted are {', '.join(ROUNDINGS)}")
    if rounding == "stochastic" and seed is None:
        raise ConfigError("NVFP4 rounding is 'stochastic', but seed is None; accepted is an integer, which makes it reproducible")
    for each in signs:
        if each is not None and (each.shape != (16,) or block != (1, 16)):
            raise ConfigError(f"NVFP4 signs are {list(each.shape)} with blocks of {block}; accepted are [16] with blocks of (1, 16)")
    multiples = (16 if wanted[1] or block == (16, 16) else 1, 16)
    if any(place < 0 or place % multiple for place, multiple in zip(offset, multiples, strict=True)):
        raise ConfigError(f"NVFP4 offset is {tuple(offset)}; accepted are multiples of {multiples}, where no block is cut")


def _filled_in(
    x: Tensor,
    wanted: tuple[bool, bool],
    amaxes: Sequence[Tensor | None],
    signs: Sequence[Tensor | None],
    square: bool,
    backend: str,
    threads: int,
) -> tuple[Tensor, Tensor]:
    """The amax of rows and columns, computed where none is given. Blocks of 16 x 16 have one for both."""
    rows, columns = amaxes
    if square:
        columns = rows
    if (wanted[0] and rows is None) or (wanted[1] and columns is None):
        of_rows, of_columns = amax_both(x, row_signs=signs[0], column_signs=signs[1], backend=backend, threads=threads)
        rows, columns = of_rows if rows is None else rows, of_columns if columns is None else columns
    columns = rows if columns is None or square else columns
    return tuple(each.to(x.device, torch.float32).reshape(()) for each in (rows, columns))


def _definition(
    x: Tensor, rows: bool, columns: bool, row_amax: Tensor, column_amax: Tensor, square: bool, stochastic: bool, seed: int,
    first_row: int, first_column: int, row_signs: Tensor | None, column_signs: Tensor | None, backend: str, threads: int,
) -> list[Tensor]:  # fmt: skip
    seeds = seed if stochastic else None
    codes, scales = _rows_defined(rotated(x, row_signs).float(), row_amax, square, seeds, ROW_STREAM, first_row, first_column // 16)
    parts = [pack_nibbles(codes), scales]
    if not columns:
        return parts
    if square:
        codes = torch.nn.functional.pad(codes[:, : x.shape[1]], (0, 0, 0, -len(x) % 16)).mT
        return [*parts, pack_nibbles(codes), scales.mT.contiguous()]
    changed = rotated(x.mT, column_signs).float()
    codes, scales = _rows_defined(changed, column_amax, square, seeds, COLUMN_STREAM, first_column, first_row // 16)
    return [*parts, pack_nibbles(codes), scales]


def _rows_defined(
    x: Tensor, amax: Tensor, square: bool, seed: int | None, stream: int, first_row: int, first_block: int
) -> tuple[Tensor, Tensor]:
    """Codes [M, K] and scale bytes of float32 ``x``, K a multiple of 16. Divisions are true ones: tensor / tensor."""
    height = 16 if square else 1
    padded = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % height))
    blocks = padded.unflatten(1, (-1, 16)).unflatten(0, (-1, height))  # [M / height, height, K / 16, 16]
    tensor_scale = _tensor_scale(amax)
    block_amax = blocks.abs().amax((1, 3))
    scales = encode_fp8(torch.fmin(block_amax * (tensor_scale * (1.0 / 6.0)), _like(LARGEST_FLOAT, x)), torch.float8_e4m3fn)
    decoded = scales.view(torch.float8_e4m3fn).float() * torch.div(_like(1.0, x), tensor_scale)
    factors = torch.fmin(torch.div(torch.ones_like(decoded), decoded), _like(LARGEST_FLOAT, x))
    scaled = (blocks * factors[:, None, :, None]).flatten(0, 1)[: len(x)]
    if seed is None:
        return encode_e2m1(scaled).flatten(1), scales
    rows = torch.arange(first_row, first_row + len(x), device=x.device)[:, None]
    places = torch.arange(first_block, first_block + scaled.shape[1], device=x.device)[None]
    return encode_e2m1_stochastic(scaled, block_random(seed, stream, rows, places)).flatten(1), scales


def _tensor_scale(amax: Tensor) -> Tensor:
    """By what the tensor is multiplied, so that its largest scale and value meet 448 and 6; 1 where amax is 0 or infinite."""
    scale = torch.fmin(torch.div(_like(448.0 * 6.0, amax), amax), _like(LARGEST_FLOAT, amax))
    return torch.where((amax == 0) | (scale == 0), 1.0, scale)


def _like(value: float, x: Tensor) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=x.device)


def _dequantized(codes: Tensor, scales: Tensor, amax: Tensor, height: int) -> Tensor:
    factors = scales.view(torch.float8_e4m3fn).float() * amax * (1.0 / (448.0 * 6.0))
    values = decode_e2m1(unpack_nibbles(codes)).unflatten(1, (-1, 16))
    return (values * factors.repeat_interleave(height, 0)[: len(codes), :, None]).flatten(1)


@torch.library.custom_op("megatron_ext::nvfp4_quantize", mutates_args=())
def _compiled(
    x: Tensor, rows: bool, columns: bool, row_amax: Tensor, column_amax: Tensor, square: bool, stochastic: bool, seed: int,
    first_row: int, first_column: int, row_signs: Tensor | None, column_signs: Tensor | None, backend: str, threads: int,
) -> list[Tensor]:  # fmt: skip
    parts = _outputs(x, rows, columns, square)
    row_codes, row_scales, column_codes, column_scales = parts
    native.call(
        "nvfp4_quantize", "nvfp4_quantize", backend, threads, x, x.dtype, *x.shape, square, stochastic, seed, first_row, first_column,
        row_codes if rows else None, row_scales, row_amax, row_signs,
        column_codes if columns else None, column_scales, column_amax, column_signs,
    )  # fmt: skip
    return parts


@_compiled.register_fake
def _(x: Tensor, rows: bool, columns: bool, row_amax: Tensor, column_amax: Tensor, square: bool, *arguments: object) -> list[Tensor]:
    return _outputs(x, rows, columns, square)


def _outputs(x: Tensor, rows: bool, columns: bool, square: bool) -> list[Tensor]:
    """Codes and scale bytes of rows and of columns; empty where not wanted."""
    parts = []
    for wanted, (height, width) in ((rows, x.shape), (columns, x.mT.shape)):
        blocks = (width + 15) // 16
        scale_rows = (height + 15) // 16 if square else height
        shapes = [(height, 8 * blocks), (scale_rows, blocks)] if wanted else [(0, 0), (0, 0)]
        parts += [x.new_empty(shape, dtype=torch.uint8) for shape in shapes]
    return parts


@torch.library.custom_op("megatron_ext::nvfp4_dequantize", mutates_args=())
def _dequantize_compiled(
    codes: Tensor, scales: Tensor, amax: Tensor, height: int, dtype: torch.dtype, backend: str, threads: int
) -> Tensor:
    rows, blocks = codes.shape[0], codes.shape[1] // 8
    out = torch.empty(rows, 16 * blocks, dtype=dtype, device=codes.device)
    native.call("nvfp4_dequantize", "nvfp4_dequantize", backend, threads, codes, scales, amax, rows, blocks, height, dtype, out)
    return out


@_dequantize_compiled.register_fake
def _(codes: Tensor, scales: Tensor, amax: Tensor, height: int, dtype: torch.dtype, *arguments: object) -> Tensor:
    return codes.new_empty(codes.shape[0], 2 * codes.shape[1], dtype=dtype)
