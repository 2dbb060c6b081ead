"""Backends of kernels as parameters of tests, each skipped with its reason where this machine cannot run it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.errors import ConfigError


def native_backends(try_backend: Callable[[str], object]) -> list[Any]:
    """The C++ backends by instruction set, and CUDA. ``try_backend`` calls the kernel with one, which raises if it cannot run."""
    cpus = [
        pytest.param(name, marks=pytest.mark.skipif(not _runs(try_backend, name), reason=f"{name}: this machine cannot run it"))
        for name in ("cpu-portable", "cpu-avx2", "cpu-avx512")
    ]
    return [*cpus, pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="cuda: there is no GPU"))]


def _runs(try_backend: Callable[[str], object], name: str) -> bool:
    try:
        try_backend(name)
    except ConfigError:
        return False
    return True


def on(x: Tensor, backend: str) -> Tensor:
    """``x`` where the backend computes."""
    return x.to("cuda" if backend == "cuda" else "cpu")


def uneven_matrix(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0, block: int = 32) -> Tensor:
    """Rows of scales from 1e-6 to 1e3, with rows, columns and a block of zeros."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-6, 3, max(rows, 1))[:rows, None]
    x[7:9] = 0
    x[:, 5:6] = 0
    x[block : 2 * block, block : 2 * block] = 0
    return x.to(dtype)
