"""NVFP4 quantization beside a copy of the matrix, by bytes: see bench_memory.py."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from bench_memory import COPY, copy, matrix
from torch import Tensor

from megatron_ext.kernels.amax import amax, amax_both
from megatron_ext.kernels.nvfp4_quantize import nvfp4_dequantize, nvfp4_quantize, nvfp4_quantize_both

PACKED = 9 / 16
"""Bytes of a value with its part of a scale."""


def cases(options: Any) -> Iterator[Any]:
    """For ``bench_kernels.py``: one pass over a matrix whose amax is given, and what else there is."""
    from bench_kernels import Case

    x = matrix(options)
    given = {"amax": amax(x)}
    both = {**given, "column_amax": given["amax"]}
    signs = torch.ones(16, device=x.device)
    quantized = nvfp4_quantize(x)
    one, two = x.nbytes + PACKED * x.numel(), x.nbytes + 2 * PACKED * x.numel()
    ways: dict[str, tuple[Callable[[], Sequence[Tensor]], float]] = {
        COPY: copy(x),
        "rows": (lambda: [nvfp4_quantize(x, **given).codes], one),
        "rows, amax not given": (lambda: [nvfp4_quantize(x).codes], one + x.nbytes),
        "rows, stochastic": (lambda: [nvfp4_quantize(x, rounding="stochastic", seed=1, **given).codes], one),
        "rows and columns": (lambda: [nvfp4_quantize_both(x, **both)[1].codes], two),
        "rows and transformed columns": (lambda: [nvfp4_quantize_both(x, column_signs=signs, **both)[1].codes], two),
        "blocks of 16 x 16, both": (lambda: [nvfp4_quantize_both(x, block=(16, 16), **given)[1].codes], two),
        "amax": (lambda: [amax(x)], x.nbytes),
        "amax, also of transformed columns": (lambda: [amax_both(x, column_signs=signs)[1]], x.nbytes),
        "dequantize": (lambda: [nvfp4_dequantize(quantized, x.dtype)], one),
    }
    title = f"nvfp4 of {list(x.shape)}, {str(x.dtype).removeprefix('torch.')}"
    yield Case(title, {name: run for name, (run, _) in ways.items()}, {name: moved for name, (_, moved) in ways.items()})
