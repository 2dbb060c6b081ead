"""FP8 quantization beside a copy of the matrix, by bytes: see bench_memory.py."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench_memory import COPY, copy, matrix
from torch import Tensor

from megatron_ext.kernels.amax import amax
from megatron_ext.kernels.fp8_quantize import BLOCKS, fp8_dequantize, fp8_quantize, fp8_quantize_both


def cases(options: Any) -> Iterator[Any]:
    """For ``bench_kernels.py``: rows alone, and with columns, of each scaling; amaxes of tensors and rows are given and not timed."""
    from bench_kernels import Case

    x = matrix(options)
    given: dict[str, tuple[Tensor | None, Tensor | None]] = dict.fromkeys(BLOCKS, (None, None))
    given["tensorwise"] = (amax(x), None)
    given["rowwise"] = (x.abs().amax(1, keepdim=True).float(), x.abs().amax(0)[:, None].float())
    quantized = fp8_quantize(x)
    one, two = x.nbytes + x.numel(), x.nbytes + 2 * x.numel()
    ways: dict[str, tuple[Callable[[], Sequence[Tensor]], float]] = {COPY: copy(x)}
    for scaling, (rows, columns) in given.items():
        ways[scaling] = (lambda s=scaling, r=rows: [fp8_quantize(x, scaling=s, amax=r).codes], one)
        both = {"scaling": scaling, "amax": rows, "column_amax": columns}
        ways[f"{scaling}, rows and columns"] = (lambda both=both: [fp8_quantize_both(x, **both)[1].codes], two)
    ways["tensorwise, amax not given"] = (lambda: [fp8_quantize(x).codes], one + x.nbytes)
    ways["dequantize"] = (lambda: [fp8_dequantize(quantized, x.dtype)], one)
    title = f"fp8 of {list(x.shape)}, {str(x.dtype).removeprefix('torch.')}"
    yield Case(title, {name: run for name, (run, _) in ways.items()}, {name: moved for name, (_, moved) in ways.items()})
