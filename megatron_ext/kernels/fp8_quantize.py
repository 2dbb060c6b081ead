"""FP8 with a float32 scale for a tensor, a row or a block of 128, and MXFP8 (OCP microscaling formats 1.0); ``torch`` is the definition.

Scales of float32 are amax / largest, as 1 / (largest / amax), or with ``power_of_two`` the power of two at or above; 1 for zeros. Those of
MXFP8 are the power of two at or above amax / largest, with TransformerEngine's arithmetic; 2^-127 for zeros.

Infinity makes the scale of its block infinite and NaN makes it NaN, and so everything that is dequantized of the block, unless an amax is
given: then infinity is as the largest number, and NaN stays NaN.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels import native
from megatron_ext.kernels.minifloat import LARGEST, LARGEST_FLOAT, decode_e8m0, encode_e8m0, encode_fp8
from megatron_ext.kernels.quantized import FP8Tensor

BLOCKS = {"tensorwise": (None, None), "rowwise": (1, None), "1x128": (1, 128), "128x128": (128, 128), "mx": (1, 32)}
"""Rows and columns that share a scale, by scaling; None: all of them."""
_EXPONENT = 0x7F800000


def fp8_quantize(
    x: Tensor,
    *,
    scaling: str = "tensorwise",
    dtype: torch.dtype = torch.float8_e4m3fn,
    amax: Tensor | None = None,
    power_of_two: bool = False,
    backend: str = "auto",
    threads: int | None = None,
) -> FP8Tensor:
    """Quantize the rows of a matrix.

    Args:
        x: [M, K] float32 or bfloat16, of any size.
        scaling: one of ``BLOCKS``: what shares a scale.
        dtype: float8_e4m3fn or float8_e5m2.
        amax: float32 of the shape of the scales, or [] for all of them: where ``x`` is a part of what shares a scale; None: of ``x``.
        power_of_two: only powers of two as scales, which cost no bit of the values. Those of ``mx`` always are.
        backend: as in ``native.select_backend``.
        threads: of the CPU; None: as many as PyTorch uses. No bit depends on it.

    Returns:
        Codes, scales and amax of ``x``.

    Raises:
        ConfigError: an argument is none of the above, or the backend cannot run.
    """
    return _quantize(x, False, scaling, dtype, (amax, None), power_of_two, backend, threads)[0]


def fp8_quantize_both(
    x: Tensor,
    *,
    scaling: str = "tensorwise",
    dtype: torch.dtype = torch.float8_e4m3fn,
    amax: Tensor | None = None,
    column_amax: Tensor | None = None,
    power_of_two: bool = False,
    backend: str = "auto",
    threads: int | None = None,
) -> tuple[FP8Tensor, FP8Tensor]:
    """Quantize the rows and the columns of a matrix in one read of it, after that for the amax of tensors and rows where none is given.

    Arguments as of ``fp8_quantize``. The columns are ``fp8_quantize(x.T, amax=column_amax)``, an FP8Tensor of x^T. With one scale for the
    tensor or for 128 x 128 they have the codes and the amax of the rows.
    """
    return _quantize(x, True, scaling, dtype, (amax, column_amax), power_of_two, backend, threads)


def fp8_dequantize(
    quantized: FP8Tensor, dtype: torch.dtype = torch.bfloat16, *, backend: str = "auto", threads: int | None = None
) -> Tensor:
    """The matrix [M, K] that the codes stand for, in float32 or bfloat16.

    Raises ConfigError for another type and for a backend that cannot run.
    """
    if dtype not in native.TYPES:
        raise ConfigError(f"FP8 dequantized to {dtype}; accepted are {', '.join(map(str, native.TYPES))}")
    name, _ = native.select_backend(backend, quantized.codes.device)
    powers = quantized.scales.dtype == torch.float8_e8m0fnu
    scales = (quantized.scales.view(torch.uint8) if powers else quantized.scales).contiguous()
    arguments = (quantized.codes.contiguous(), scales, *quantized.block, quantized.dtype == torch.float8_e5m2, dtype)
    return _dequantized(*arguments) if name == "torch" else _dequantize_compiled(*arguments, name, threads or 0)


def _quantize(
    x: Tensor,
    with_columns: bool,
    scaling: str,
    dtype: torch.dtype,
    amaxes: Sequence[Tensor | None],
    power_of_two: bool,
    backend: str,
    threads: int | None,
) -> tuple[FP8Tensor, ...]:
    """Rows, and columns if they are wanted."""
    _check(x, scaling, dtype)
    name, _ = native.select_backend(backend, x.device)
    x = x.contiguous()
    blocks = [_block(scaling, shape) for shape in (x.shape, x.mT.shape)]
    rows, columns = (_amax_for(shape, *args) for shape, *args in zip((x.shape, x.mT.shape), blocks, amaxes, strict=True))
    if _shared(scaling):
        columns = None if rows is None else rows.mT
    amaxes = [None if each is None else each.to(x.device, torch.float32).contiguous() for each in (rows, columns)]
    compute = _definition if name == "torch" else _compiled
    parts = compute(x, with_columns, scaling, dtype == torch.float8_e5m2, power_of_two, *amaxes, name, threads or 0)
    outputs = []
    for (codes, scales, found), block, given in zip((parts[:3], parts[3:])[: 1 + with_columns], blocks, amaxes, strict=False):
        scales = scales.view(torch.float8_e8m0fnu) if scaling == "mx" else scales
        outputs.append(FP8Tensor(codes, scales, found if given is None else given, block, dtype))
    return tuple(outputs)


def _check(x: Tensor, scaling: str, dtype: torch.dtype) -> None:
    native.check_matrix(x, "FP8")
    if scaling not in BLOCKS:
        raise ConfigError(f"FP8 scaling is {scaling!r}; accepted are {', '.join(BLOCKS)}")
    if dtype not in LARGEST:
        raise ConfigError(f"FP8 dtype is {dtype}; accepted are {', '.join(map(str, LARGEST))}")


def _block(scaling: str, shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns that share a scale; at least 1, also of an empty matrix."""
    height, width = BLOCKS[scaling]
    return height or max(shape[0], 1), width or max(shape[1], 1)


def _shared(scaling: str) -> bool:
    """Whether columns have the codes of rows."""
    return scaling in ("tensorwise", "128x128")


def _scale_shape(shape: Sequence[int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _amax_for(shape: Sequence[int], block: tuple[int, int], amax: Tensor | None) -> Tensor | None:
    """``amax`` in the shape of the scales. Raises ConfigError if it has another one."""
    if amax is None:
        return None
    expected = _scale_shape(shape, block)
    if tuple(amax.shape) not in ((), expected):
        raise ConfigError(f"FP8 amax is {list(amax.shape)} for blocks of {block} of {list(shape)}; accepted are [], {list(expected)}")
    return amax.expand(expected)


def _definition(
    x: Tensor, columns: bool, scaling: str, e5m2: bool, power_of_two: bool,
    row_amax: Tensor | None, column_amax: Tensor | None, backend: str, threads: int,
) -> list[Tensor]:  # fmt: skip
    arguments = (scaling, torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn, power_of_two)
    parts = _rows_defined(x, row_amax, *arguments)
    return [*parts, *_rows_defined(x.mT, column_amax, *arguments)] if columns else parts


def _rows_defined(x: Tensor, amax: Tensor | None, scaling: str, dtype: torch.dtype, power_of_two: bool) -> list[Tensor]:
    """Codes [M, K], scales and amax. Divisions are true ones: tensor / tensor."""
    height, width = _block(scaling, x.shape)
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % width, 0, -x.shape[0] % height))
    blocks = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))  # [M / height, height, K / width, width]
    amax = blocks.abs().amax((1, 3)) if amax is None else amax
    one, largest = (torch.full_like(amax, value) for value in (1.0, LARGEST[dtype]))
    if scaling == "mx":
        scales = encode_e8m0(amax * (one / largest))
        factors = decode_e8m0(254 - scales.clamp(max=254))
    else:
        usable = (amax > 0) & amax.isfinite()
        factors = torch.fmin(largest / torch.where(usable, amax, largest), torch.full_like(amax, LARGEST_FLOAT))
        if power_of_two:
            factors = (factors.view(torch.int32) & _EXPONENT).view(torch.float32)
        scales = torch.where(amax.isfinite(), one / factors, amax)
    codes = encode_fp8(blocks * factors[:, None, :, None], dtype).flatten(0, 1).flatten(1)
    return [codes[: x.shape[0], : x.shape[1]].contiguous(), scales, amax]


@torch.library.custom_op("megatron_ext::fp8_quantize", mutates_args=())
def _compiled(
    x: Tensor, columns: bool, scaling: str, e5m2: bool, power_of_two: bool,
    row_amax: Tensor | None, column_amax: Tensor | None, backend: str, threads: int,
) -> list[Tensor]:  # fmt: skip
    parts = _outputs(x, columns, scaling)
    if x.numel() == 0:
        return parts
    found = [parts[2], parts[5] if columns else None]
    given = [row_amax, column_amax]
    if scaling == "tensorwise" and row_amax is None:
        native.call("amax", "amax", backend, threads, x, x.dtype, *x.shape, None, None, found[0], None)
        if columns:
            parts[5].copy_(parts[2])
        given = found
    elif scaling == "rowwise" and any(amax is None for amax in given[: 1 + columns]):
        sought = [into if amax is None else None for into, amax in zip(found, given, strict=True)]
        native.call("fp8_quantize", "fp8_amax", backend, threads, x, x.dtype, *x.shape, *sought)
        given = [into if amax is None else amax for into, amax in zip(found, given, strict=True)]
    rows = (*parts[:3], given[0], *_block(scaling, x.shape))
    of_columns = (*(parts[3:] if columns else [None] * 3), given[1], *_block(scaling, x.mT.shape))
    native.call(
        "fp8_quantize", "fp8_quantize", backend, threads, x, x.dtype, *x.shape, e5m2, power_of_two, scaling == "mx", *rows, *of_columns
    )  # fmt: skip
    return parts


@_compiled.register_fake
def _(x: Tensor, columns: bool, scaling: str, *arguments: object) -> list[Tensor]:
    return _outputs(x, columns, scaling)


def _outputs(x: Tensor, columns: bool, scaling: str) -> list[Tensor]:
    """Codes, scales and amax of rows, and of columns if they are wanted."""
    parts = []
    for shape in (x.shape, x.mT.shape)[: 1 + columns]:
        scale_shape = _scale_shape(shape, _block(scaling, shape))
        parts.append(x.new_empty(shape, dtype=torch.uint8))
        parts.append(x.new_empty(scale_shape, dtype=torch.uint8 if scaling == "mx" else torch.float32))
        parts.append(x.new_zeros(scale_shape, dtype=torch.float32))
    return parts


def _dequantized(codes: Tensor, scales: Tensor, height: int, width: int, e5m2: bool, dtype: torch.dtype) -> Tensor:
    factors = decode_e8m0(scales) if scales.dtype == torch.uint8 else scales
    factors = factors.repeat_interleave(height, 0)[: len(codes)].repeat_interleave(width, 1)[:, : codes.shape[1]]
    return (codes.view(torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn).float() * factors).to(dtype)


@torch.library.custom_op("megatron_ext::fp8_dequantize", mutates_args=())
def _dequantize_compiled(
    codes: Tensor, scales: Tensor, height: int, width: int, e5m2: bool, dtype: torch.dtype, backend: str, threads: int
) -> Tensor:
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    mx = scales.dtype == torch.uint8
    sizes = (*codes.shape, height, width)
    if codes.numel():
        native.call("fp8_quantize", "fp8_dequantize", backend, threads, codes, scales, mx, *sizes, e5m2, dtype, out)
    return out


@_dequantize_compiled.register_fake
def _(codes: Tensor, scales: Tensor, height: int, width: int, e5m2: bool, dtype: torch.dtype, *arguments: object) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)
