"""FP8 products beside PyTorch's of the same matrices decoded beforehand, first in the type that the emulation multiplies in.

Only ``native`` on a GPU multiplies in 8 bits. Emulated products cost what one in a wider type costs and the decoding on top: they are no
speed-up.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from bench_kernels import Case, Options
from torch import Tensor

from megatron_ext.kernels.emulated_mm import operand_dtype
from megatron_ext.kernels.fp8_gemm import fp8_gemm, select_backend
from megatron_ext.kernels.quantized import FP8Tensor
from megatron_ext.kernels.scaled_mm import fp8_obstacle

TOKENS, WIDTH, HIDDEN = 8192, 4096, 14336
SCALINGS = {
    "tensorwise": ((None, None), (None, None)),
    "rowwise": ((1, None), (1, None)),
    "1x128 with 128x128": ((1, 128), (128, 128)),
    "mxfp8": ((1, 32), (1, 32)),
}
"""Rows and columns of the blocks of activations and of weights; None: all."""


def cases(options: Options) -> Iterator[Case]:
    """For ``bench_kernels.py``: the up projection of a Llama of 8 billion parameters, with codes of random numbers and scales of 1."""
    tokens, columns, depth = (size // options.scale for size in (TOKENS, HIDDEN, WIDTH))
    x, w = (torch.randn(rows, depth, device=options.device).to(torch.float8_e4m3fn) for rows in (tokens, columns))
    library: dict[str, Callable[[], Sequence[Tensor]]] = {}
    for dtype in dict.fromkeys((operand_dtype(options.device), options.dtype)):
        left, right = x.to(dtype), w.to(dtype)
        library[f"PyTorch in {str(dtype).removeprefix('torch.')}"] = lambda left=left, right=right: [left @ right.T]
    for scaling, blocks in SCALINGS.items():
        a, b = (_scaled(codes, *block) for codes, block in zip((x, w), blocks, strict=True))
        ways = dict(library)
        for name in dict.fromkeys(("torch", options.device.type, *(() if fp8_obstacle(a, b) else ("native",)))):
            ways[name] = lambda a=a, b=b, name=name: [fp8_gemm(a, b, out_dtype=options.dtype, backend=name)]
        name, why = select_backend("auto", a, b)
        yield Case(f"fp8_gemm of {tokens} x {columns} over {depth}, {scaling}: {name} ({why}; what is emulated is no speed-up)", ways)


def _scaled(codes: Tensor, height: int | None, width: int | None) -> FP8Tensor:
    """``codes`` with scales of 1."""
    block = (height or codes.shape[0], width or codes.shape[1])
    scales = torch.ones(*(-(-size // length) for size, length in zip(codes.shape, block, strict=True)), device=codes.device)
    return FP8Tensor(codes.view(torch.uint8), scales.to(torch.float8_e8m0fnu) if block[1] == 32 else scales, 448 * scales, block)
