"""Largest magnitudes: of a matrix, and of its random Hadamard transforms, which per-tensor scales are made from."""

import torch
from torch import Tensor

from megatron_ext.kernels import native
from megatron_ext.kernels.hadamard import hadamard_transform


def amax(x: Tensor, *, signs: Tensor | None = None, backend: str = "auto", threads: int | None = None) -> Tensor:
    """Largest |x|, NaN if there is one. With ``signs`` [16]: of the random Hadamard transform of every 16 neighbours of a row.

    Args:
        x: [M, K] float32 or bfloat16; K is filled up with zeros to a multiple of 16.
        signs: [16] of +-1.
        backend: as in ``native.select_backend``.
        threads: of the CPU; None: as many as PyTorch uses.

    Returns:
        float32 []; 0 for an empty matrix.

    Raises:
        ConfigError: another shape or type, or the backend cannot run.
    """
    return amax_both(x, row_signs=signs, backend=backend, threads=threads)[0]


def amax_both(
    x: Tensor,
    *,
    row_signs: Tensor | None = None,
    column_signs: Tensor | None = None,
    backend: str = "auto",
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``amax(x, signs=row_signs)`` and ``amax(x.T, signs=column_signs)`` from one read."""
    native.check_matrix(x, "amax")
    name, _ = native.select_backend(backend, x.device)
    if name == "torch":
        return _definition(x, row_signs), _definition(x.mT, column_signs)
    both = _compiled(x.contiguous(), _as_factors(row_signs, x), _as_factors(column_signs, x), name, threads or 0)
    return both[0], both[1]


def rotated(x: Tensor, signs: Tensor | None) -> Tensor:
    """``x`` [M, K] with K filled up with zeros to a multiple of 16, and with ``signs`` every 16 neighbours of a row transformed."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % 16))
    return padded if signs is None else hadamard_transform(padded, 0.25, signs, 16, backend="torch")


def _as_factors(signs: Tensor | None, x: Tensor) -> Tensor | None:
    return None if signs is None else signs.to(x.device, torch.float32).contiguous()


def _definition(x: Tensor, signs: Tensor | None) -> Tensor:
    changed = rotated(x, signs)
    return changed.abs().amax().float() if changed.numel() else torch.zeros((), device=x.device)


@torch.library.custom_op("megatron_ext::amax", mutates_args=())
def _compiled(x: Tensor, row_signs: Tensor | None, column_signs: Tensor | None, backend: str, threads: int) -> Tensor:
    both = torch.zeros(2, device=x.device)
    native.call("amax", "amax", backend, threads, x, x.dtype, *x.shape, row_signs, column_signs, both[:1], both[1:])
    return both


@_compiled.register_fake
def _(x: Tensor, *arguments: object) -> Tensor:
    return x.new_empty(2, dtype=torch.float32)
