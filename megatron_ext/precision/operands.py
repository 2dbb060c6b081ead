"""From an operand of a linear and its recipe to codes: by rows, by columns, or both from one read."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.kernels.amax import amax_both
from megatron_ext.kernels.fp8_quantize import fp8_quantize, fp8_quantize_both
from megatron_ext.kernels.mxfp4_quantize import COLUMN_STREAM, mxfp4_quantize, mxfp4_quantize_both
from megatron_ext.kernels.nvfp4_quantize import nvfp4_quantize, nvfp4_quantize_both
from megatron_ext.kernels.quantized import FP8Tensor, MXFP4Tensor, NVFP4Tensor
from megatron_ext.precision.recipe import Operand

Quantized = NVFP4Tensor | FP8Tensor | MXFP4Tensor
Pair = tuple[Quantized | None, Quantized | None]
"""Quantized rows of a matrix [M, K], and its columns as rows of [K, M]; None what is not wanted."""


class Reduces(Protocol):
    """What is asked of a process group."""

    size: int

    def all_reduce(self, tensor: Tensor, op: Any) -> Tensor:
        """Reduce in place over the ranks."""
        ...


@dataclasses.dataclass(frozen=True)
class Part:
    """What of the whole matrix a rank has, and where random numbers come from."""

    group: Reduces | None = None
    """Ranks that have the other parts; None: this one has the whole."""
    dimension: int = 1
    """Which dimension of the matrix they divide."""
    offset: tuple[int, int] = (0, 0)
    """Row and column of the part in the whole."""
    seed: int | None = None
    """Of stochastic rounding."""
    signs: Tensor | None = None
    """Of the random Hadamard transform, as many as its order."""


def quantize(x: Tensor, rows: Operand | None, columns: Operand | None, part: Part) -> Pair:
    """Quantize a matrix [M, K] for the products that want it.

    Scales that cover more than this rank's part (of the tensor, of rows that are divided) are those of the whole: they are reduced over
    the ranks of ``part.group``. Scales of blocks are those of the whole where no block is divided.
    """
    wanted = rows or columns
    if wanted is None:
        return None, None
    return {"nvfp4": _nvfp4, "mxfp4": _mxfp4}.get(wanted.format, _fp8)(x, rows, columns, part)


def _nvfp4(x: Tensor, rows: Operand | None, columns: Operand | None, part: Part) -> Pair:
    operand = rows or columns
    assert operand is not None and not (rows and rows.transform), "a transform of rows is in no recipe"
    signs = part.signs if columns is not None and columns.transform else None
    options: dict[str, Any] = {
        "block": (16, 16) if operand.square else (1, 16),
        "rounding": "stochastic" if operand.stochastic else "nearest",
        "seed": part.seed,
    }
    row_amax, column_amax = _amaxes(x, signs, part.group)
    # The kernel counts in whole blocks; where a part begins inside one, the next is still no other part's.
    offset = tuple(-(-place // 16) * 16 for place in part.offset)
    if columns is None:
        return nvfp4_quantize(x, amax=row_amax, offset=offset, **options), None
    if rows is None:
        return None, nvfp4_quantize(x.mT, amax=column_amax, signs=signs, offset=offset[::-1], **options)
    return nvfp4_quantize_both(x, amax=row_amax, column_amax=column_amax, column_signs=signs, offset=offset, **options)


def _amaxes(x: Tensor, signs: Tensor | None, group: Reduces | None) -> Sequence[Tensor | None]:
    """Of rows and of columns over all parts; None where the part is the whole, because the quantizer finds them itself."""
    if group is None or group.size == 1:
        return None, None
    both = torch.stack(amax_both(x, column_signs=signs))
    return group.all_reduce(both, dist.ReduceOp.MAX).unbind()


def _fp8(x: Tensor, rows: Operand | None, columns: Operand | None, part: Part) -> Pair:
    operand = rows or columns
    assert operand is not None and not operand.stochastic, "a choice of recipes of 4 bits"
    square = "128x128" if operand.square else "1x128"
    scaling = {"fp8_tensorwise": "tensorwise", "fp8_rowwise": "rowwise", "fp8_blockwise": square, "mxfp8": "mx"}[operand.format]
    options: dict[str, Any] = {"scaling": scaling, "dtype": operand.dtype, "power_of_two": operand.power_of_two}
    amaxes: list[Tensor | None] = [None, None]
    if part.group is not None and part.group.size > 1:
        if scaling == "tensorwise":
            amaxes = [part.group.all_reduce(amax_both(x)[0], dist.ReduceOp.MAX)] * 2
        elif scaling == "rowwise" and (rows, columns)[1 - part.dimension]:
            # Of the lines that the ranks divide: rows where they divide columns, columns where they divide rows.
            lines = x.abs().amax(part.dimension)[:, None].float()
            amaxes[1 - part.dimension] = part.group.all_reduce(lines, dist.ReduceOp.MAX)
    if columns is None:
        return fp8_quantize(x, amax=amaxes[0], **options), None
    if rows is None:
        return None, fp8_quantize(x.mT, amax=amaxes[1], **options)
    return fp8_quantize_both(x, amax=amaxes[0], column_amax=amaxes[1], **options)


def _mxfp4(x: Tensor, rows: Operand | None, columns: Operand | None, part: Part) -> Pair:
    operand = rows or columns
    assert operand is not None and not (rows and rows.transform), "a transform of rows is in no recipe"
    signs = part.signs if columns is not None and columns.transform else None
    options: dict[str, Any] = {"square": operand.square, "seed": part.seed if operand.stochastic else None}
    offset = tuple(-(-place // 32) * 32 for place in part.offset)
    if columns is None:
        return mxfp4_quantize(x, offset=offset, **options), None
    if rows is None:
        return None, mxfp4_quantize(x.mT, stream=COLUMN_STREAM, signs=signs, offset=offset[::-1], **options)
    return mxfp4_quantize_both(x, column_signs=signs, offset=offset, **options)


def stripped(quantized: Quantized) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Quantized]]:
    """The tensors of a quantized matrix, for autograd to keep, and what makes the matrix of them again without holding them.

    The signs are not of the matrix but of the run, and no product looks at the amax of FP8.
    """
    if isinstance(quantized, FP8Tensor):
        quantized = dataclasses.replace(quantized, amax=quantized.amax.new_empty(0))
    values = {field.name: getattr(quantized, field.name) for field in dataclasses.fields(quantized) if field.name != "signs"}
    found = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    rest = dataclasses.replace(quantized, **dict.fromkeys(found))
    names = list(found)
    return list(found.values()), lambda tensors: dataclasses.replace(rest, **dict(zip(names, tensors, strict=True)))
