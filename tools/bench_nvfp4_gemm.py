"""NVFP4 products beside PyTorch's of the same matrices decoded beforehand, first in the type that the emulation multiplies in.

Only ``native`` multiplies in 4 bits. Emulated products cost what one in a wider type costs and the decoding on top: they are no speed-up.
``triton`` is meant for few rows, where a product takes as long as reading the weight, which is shorter as codes.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from bench_kernels import Case, Options
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.emulated_mm import operand_dtype
from megatron_ext.kernels.nvfp4_gemm import BACKENDS, nvfp4_gemm, select_backend
from megatron_ext.kernels.nvfp4_quantize import nvfp4_dequantize, nvfp4_quantize

TOKENS, WIDTH, HIDDEN = 8192, 4096, 14336
FEW = (16, 64)
"""Tokens of products that mostly read the weight; not divided by the scale."""


def cases(options: Options) -> Iterator[Case]:
    """For ``bench_kernels.py``: the up and down projections of a Llama of 8 billion parameters."""
    width, hidden = WIDTH // options.scale, HIDDEN // options.scale
    many = TOKENS // options.scale
    shapes = [(many, hidden, width), (many, width, hidden), *((few, hidden, width) for few in FEW)]
    for tokens, columns, depth in shapes:
        a = nvfp4_quantize(torch.randn(tokens, depth, device=options.device))
        b = nvfp4_quantize(torch.randn(columns, depth, device=options.device), block=(16, 16))
        ways: dict[str, Callable[[], Sequence[Tensor]]] = {}
        for dtype in dict.fromkeys((operand_dtype(options.device), options.dtype)):
            left, right = (nvfp4_dequantize(x, torch.float32).to(dtype) for x in (a, b))
            ways[f"PyTorch in {str(dtype).removeprefix('torch.')}"] = lambda left=left, right=right: [left @ right.T]
        for name in BACKENDS[1:]:
            if _runs(name, options.device):
                ways[name] = lambda a=a, b=b, name=name: [nvfp4_gemm(a, b, out_dtype=options.dtype, backend=name)]
        name, why = select_backend("auto", options.device, tokens, columns)
        yield Case(f"nvfp4_gemm of {tokens} x {columns} over {depth}: {name} ({why}; what is emulated is no speed-up)", ways)


def _runs(name: str, device: torch.device) -> bool:
    try:
        select_backend(name, device, 1, 1)
    except ConfigError:
        return False
    return True
