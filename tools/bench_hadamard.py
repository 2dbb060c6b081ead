"""Hadamard transforms beside a copy of the matrix, by bytes: see bench_memory.py."""

from collections.abc import Iterator
from typing import Any

from bench_memory import COPY, TOKENS, WIDTH, copy, matrix

from megatron_ext.kernels.hadamard import hadamard_transform

ORDERS = (16, 128, 512, 1024, 4096, 8192, 14336, 32768)


def cases(options: Any) -> Iterator[Any]:
    """For ``bench_kernels.py``: as many values of each order; 14336 is 28 x 512."""
    from bench_kernels import Case

    for order in ORDERS:
        size = (TOKENS // options.scale) * (WIDTH // options.scale) // order * order
        x = matrix(options).flatten().repeat(2)[:size].view(-1, order) if size else matrix(options, order * options.scale)[:1]
        name = f"transform of order {order}"
        ways = {COPY: copy(x), name: (lambda x=x, order=order: [hadamard_transform(x, order**-0.5)], 2 * x.nbytes)}
        title = f"hadamard of {list(x.shape)}, {str(x.dtype).removeprefix('torch.')}"
        yield Case(title, {name: run for name, (run, _) in ways.items()}, {name: moved for name, (_, moved) in ways.items()})
