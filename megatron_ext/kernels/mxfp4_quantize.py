"""MXFP4 (OCP microscaling formats 1.0): E2M1 codes, a power of two for each block of 32; backend ``torch`` is the definition.

The scale of a block is the power of two at or above amax / 6, so that nothing saturates; a block of zeros has 2^-127. Infinity is as the
largest number of a block with scale 2^127; a block with a NaN has scale NaN and the code of +6 throughout.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels import native
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
from megatron_ext.kernels.quantized import MXFP4Tensor

BLOCK = 32
ROW_STREAM, COLUMN_STREAM = 0, 1
"""Random bits of the rows and of the columns of a matrix."""


def mxfp4_quantize(
    x: Tensor,
    *,
    square: bool = False,
    seed: int | None = None,
    stream: int = ROW_STREAM,
    signs: Tensor | None = None,
    offset: tuple[int, int] = (0, 0),
    backend: str = "auto",
    threads: int | None = None,
) -> MXFP4Tensor:
    """Quantize the rows of a matrix.

    Args:
        x: [M, K] float32 or bfloat16, of any size; K is filled up with zeros to a multiple of 32.
        square: one scale for 32 x 32 values instead of 1 x 32.
        seed: round up or down at random from these 63 bits and the place in the whole matrix; None: to nearest, ties to even.
        stream: tells the random numbers of two quantizations of one matrix apart.
        signs: [32] of +-1: transform every 32 neighbours of a row first (random Hadamard transform), rounded to the type of ``x``.
        offset: row and column of ``x`` in the whole matrix; multiples of 32 where blocks would be cut otherwise.
        backend: as in ``native.select_backend``.
        threads: of the CPU; None: as many as PyTorch uses. No bit depends on it.

    Returns:
        Codes and scales.

    Raises:
        ConfigError: an argument is none of the above, or the backend cannot run.
    """
    return _quantize(x, (True, False), square, seed, (stream, COLUMN_STREAM), (signs, None), offset, backend, threads)[0]


def mxfp4_quantize_both(
    x: Tensor,
    *,
    square: bool = False,
    seed: int | None = None,
    signs: Tensor | None = None,
    column_signs: Tensor | None = None,
    offset: tuple[int, int] = (0, 0),
    backend: str = "auto",
    threads: int | None = None,
) -> tuple[MXFP4Tensor, MXFP4Tensor]:
    """Quantize the rows and the columns of a matrix in one read of it.

    Arguments as of ``mxfp4_quantize``. The columns are ``mxfp4_quantize(x.T, stream=1, signs=column_signs, offset=offset[::-1])``. Square
    blocks rounded to nearest have the same codes in both.
    """
    streams = (ROW_STREAM, COLUMN_STREAM)
    rows, columns = _quantize(x, (True, True), square, seed, streams, (signs, column_signs), offset, backend, threads)
    return rows, columns


def mxfp4_dequantize(quantized: MXFP4Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[M, K'] as matrix products see it: transformed if it was transformed. Exact in bfloat16 but for scales at the ends of the range."""
    factors = decode_e8m0(quantized.scales)
    if quantized.square:
        factors = factors.repeat_interleave(BLOCK, 0)[: len(quantized.codes)]
    values = decode_e2m1(unpack_nibbles(quantized.codes)).unflatten(1, (-1, BLOCK))
    return (values * factors[:, :, None]).flatten(1).to(dtype)


def _quantize(
    x: Tensor,
    wanted: tuple[bool, bool],
    square: bool,
    seed: int | None,
    streams: tuple[int, int],
    signs: tuple[Tensor | None, Tensor | None],
    offset: tuple[int, int],
    backend: str,
    threads: int | None,
) -> tuple[MXFP4Tensor, ...]:
    """Rows and columns, those of them that are ``wanted``."""
    _check(x, wanted, square, signs, offset)
    name, _ = native.select_backend(backend, x.device)
    x = x.contiguous()
    row_signs, column_signs = (None if each is None else each.to(x.device, torch.float32).contiguous() for each in signs)
    compute = _definition if name == "torch" else _compiled
    parts = compute(x, *wanted, square, seed is not None, seed or 0, *offset, *streams, row_signs, column_signs, name, threads or 0)
    shapes = ((x.shape[0], x.shape[1]), (x.shape[1], x.shape[0]))
    return tuple(MXFP4Tensor(*parts[2 * index : 2 * index + 2], shapes[index], square) for index in (0, 1) if wanted[index])


def _check(x: Tensor, wanted: tuple[bool, bool], square: bool, signs: tuple[Tensor | None, Tensor | None], offset: tuple[int, int]) -> None:
    native.check_matrix(x, "MXFP4")
    for each in signs:
        if each is not None and (each.shape != (BLOCK,) or square):
            raise ConfigError(f"MXFP4 signs are {list(each.shape)} with square: {square}; accepted are [{BLOCK}] with square: False")
    multiples = (BLOCK if wanted[1] or square else 1, BLOCK)
    if any(place < 0 or place % multiple for place, multiple in zip(offset, multiples, strict=True)):
        raise ConfigError(f"MXFP4 offset is {tuple(offset)}; accepted are multiples of {multiples}, where no block is cut")


def _definition(
    x: Tensor, rows: bool, columns: bool, square: bool, stochastic: bool, seed: int, first_row: int, first_column: int,
    row_stream: int, column_stream: int, row_signs: Tensor | None, column_signs: Tensor | None, backend: str, threads: int,
) -> list[Tensor]:  # fmt: skip
    seeds = seed if stochastic else None
    parts = _rows_defined(x, square, seeds, row_stream, row_signs, first_row, first_column)
    return [*parts, *_rows_defined(x.mT, square, seeds, column_stream, column_signs, first_column, first_row)] if columns else parts


def _rows_defined(
    x: Tensor, square: bool, seed: int | None, stream: int, signs: Tensor | None, first_row: int, first_column: int
) -> list[Tensor]:
    """Packed codes and scale bytes. Divisions are true ones: tensor / tensor."""
    padded = F.pad(x, (0, -x.shape[1] % BLOCK))
    if signs is not None:
        padded = hadamard_transform(padded, BLOCK**-0.5, signs, BLOCK, backend="torch")
    height = BLOCK if square else 1
    blocks = F.pad(padded.float(), (0, 0, 0, -len(x) % height)).unflatten(1, (-1, BLOCK)).unflatten(0, (-1, height))
    amax = blocks.abs().amax((1, 3))
    scales = encode_e8m0(amax / torch.full_like(amax, 6.0))
    scaled = (blocks / decode_e8m0(scales)[:, None, :, None]).flatten(0, 1)[: len(x)].flatten(1)
    if seed is None:
        return [pack_nibbles(encode_e2m1(scaled)), scales]
    rows = torch.arange(len(x), device=x.device)[:, None] + first_row
    places = torch.arange(scaled.shape[1] // 16, device=x.device)[None] + first_column // 16
    codes = encode_e2m1_stochastic(scaled.unflatten(1, (-1, 16)), block_random(seed, stream, rows, places)).flatten(1)
    return [pack_nibbles(codes), scales]


@torch.library.custom_op("megatron_ext::mxfp4_quantize", mutates_args=())
def _compiled(
    x: Tensor, rows: bool, columns: bool, square: bool, stochastic: bool, seed: int, first_row: int, first_column: int,
    row_stream: int, column_stream: int, row_signs: Tensor | None, column_signs: Tensor | None, backend: str, threads: int,
) -> list[Tensor]:  # fmt: skip
    parts = _outputs(x, rows, columns, square)
    if x.numel():
        native.call(
            "mxfp4_quantize", "mxfp4_quantize", backend, threads, x, x.dtype, *x.shape, square, stochastic, seed,
            first_row, first_column, row_stream, column_stream, parts[0] if rows else None, parts[1], row_signs,
            parts[2] if columns else None, parts[3], column_signs,
        )  # fmt: skip
    return parts


@_compiled.register_fake
def _(x: Tensor, rows: bool, columns: bool, square: bool, *arguments: object) -> list[Tensor]:
    return _outputs(x, rows, columns, square)


def _outputs(x: Tensor, rows: bool, columns: bool, square: bool) -> list[Tensor]:
    """Codes and scale bytes of rows and of columns; empty where not wanted."""
    parts = []
    for wanted, (height, width) in ((rows, x.shape), (columns, x.mT.shape)):
        blocks = -(-width // BLOCK)
        scale_rows = -(-height // BLOCK) if square else height
        shapes = [(height, BLOCK // 2 * blocks), (scale_rows, blocks)] if wanted else [(0, 0), (0, 0)]
        parts += [x.new_empty(shape, dtype=torch.uint8) for shape in shapes]
    return parts
