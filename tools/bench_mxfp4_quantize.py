"""MXFP4 quantization beside a copy of the matrix, by bytes: see bench_memory.py."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from bench_memory import COPY, copy, matrix
from torch import Tensor

from megatron_ext.kernels.mxfp4_quantize import mxfp4_quantize, mxfp4_quantize_both

PACKED = 17 / 32
"""Bytes of a value with its part of a scale."""


def cases(options: Any) -> Iterator[Any]:
    """For ``bench_kernels.py``: one pass over a matrix; there is no amax of the tensor to find before."""
    from bench_kernels import Case

    x = matrix(options)
    signs = torch.ones(32, device=x.device)
    one, two = x.nbytes + PACKED * x.numel(), x.nbytes + 2 * PACKED * x.numel()
    ways: dict[str, tuple[Callable[[], Sequence[Tensor]], float]] = {
        COPY: copy(x),
        "rows": (lambda: [mxfp4_quantize(x).codes], one),
        "rows, stochastic": (lambda: [mxfp4_quantize(x, seed=1).codes], one),
        "rows and columns": (lambda: [mxfp4_quantize_both(x)[1].codes], two),
        "rows and transformed columns": (lambda: [mxfp4_quantize_both(x, column_signs=signs)[1].codes], two),
        "blocks of 32 x 32, both": (lambda: [mxfp4_quantize_both(x, square=True)[1].codes], two),
    }
    title = f"mxfp4 of {list(x.shape)}, {str(x.dtype).removeprefix('torch.')}"
    yield Case(title, {name: run for name, (run, _) in ways.items()}, {name: moved for name, (_, moved) in ways.items()})
