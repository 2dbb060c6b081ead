"""Orthogonalization of the matrices of a Llama of a billion parameters (Llama 3.2 1B), beside torch.optim.Muon's.

With the same coefficients, steps and dtype.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from bench_kernels import Case, Options
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from megatron_ext.kernels.newton_schulz import JORDAN, newton_schulz, select_backend

WIDTH, KEYS, HIDDEN = 2048, 512, 8192


def cases(options: Options) -> Iterator[Case]:
    """All matrices of all layers: q, k, v, o; gate, up; down."""
    steps = options.steps or 5
    width, keys, hidden = (size // options.scale for size in (WIDTH, KEYS, HIDDEN))
    shapes = [(width, width)] * 2 + [(keys, width)] * 2 + [(hidden, width)] * 2 + [(width, hidden)]
    matrices = [torch.randn(shape, device=options.device) for _ in range(options.layers) for shape in shapes]
    name, why = select_backend("auto", options.device, options.dtype)
    ways: dict[str, Callable[[], Sequence[Tensor]]] = {"torch.optim.Muon": lambda: [torchs(m, options.dtype, steps) for m in matrices]}
    for backend in dict.fromkeys(("blas", name)):
        for method in ("standard", "gram", "auto"):
            ways[f"{method}, {backend}"] = lambda method=method, backend=backend: ours(matrices, options.dtype, steps, method, backend)
    dtype = str(options.dtype).removeprefix("torch.")
    yield Case(f"newton_schulz, {len(matrices)} matrices of {width}, {keys} and {hidden}, {steps} steps, {dtype}, {name} ({why})", ways)


def ours(matrices: Sequence[Tensor], dtype: torch.dtype, steps: int, method: str, backend: str) -> list[Tensor]:
    """As ``Muon`` does it: those of equal shapes together. Results in the order of ``matrices``."""
    results: dict[int, Tensor] = {}
    for shape in dict.fromkeys(matrix.shape for matrix in matrices):
        alike = [number for number, matrix in enumerate(matrices) if matrix.shape == shape]
        stacked = torch.stack([matrices[number] for number in alike])
        results |= dict(zip(alike, newton_schulz(stacked, steps, "jordan", method, dtype=dtype, backend=backend), strict=True))
    return [results[number] for number in range(len(matrices))]


def torchs(matrix: Tensor, dtype: torch.dtype, steps: int) -> Tensor:
    """torch.optim.Muon's, which is in bfloat16; in other dtypes, the same operations written out."""
    if dtype == torch.bfloat16:
        return _zeropower_via_newtonschulz(matrix, JORDAN, steps, 1e-7)
    a, b, c = JORDAN
    X = matrix.to(dtype, copy=True)
    X = X.T if X.shape[0] > X.shape[1] else X
    X.div_(X.norm().clamp(min=1e-7))
    for _ in range(steps):
        A = X @ X.T
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.T if matrix.shape[0] > matrix.shape[1] else X
