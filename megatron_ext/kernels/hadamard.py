"""Hadamard transforms of orders 2^k, 12 x 2^k, 20 x 2^k and 28 x 2^k, that is of 3, 5 and 7 x 2^k from 12, 20 and 28 on.

The matrix of order b x 2^k is the Kronecker product of a matrix of order b and Sylvester's of order 2^k, H_2n = [[H_n, H_n], [H_n, -H_n]].
There is none of orders 3, 5, 6, 7, 10 and 14: beyond 2, orders of Hadamard matrices are multiples of 4. Those of 12, 20 and 28 are Paley's
(1933): the first construction with the squares modulo 11 and 19, the second with those modulo 13.

All backends add in one order, so that they have the same bits: within 2^k neighbours first, with distances 1, 2, 4 ..., then over the b
rows of the small matrix from its first column to its last, in float32 (float64 for float64); then comes the scale, then the rounding.
"""

from functools import cache

import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels import native

LARGEST_ORDER = 32768
BASES = (1, 12, 20, 28)


def hadamard_transform(
    x: Tensor,
    scale: float = 1.0,
    signs: Tensor | None = None,
    block: int | None = None,
    *,
    backend: str = "auto",
    threads: int | None = None,
) -> Tensor:
    """scale x H (signs * x) along the last dimension.

    With scale = n^-1/2 the transform keeps lengths; with random signs it is the randomized Hadamard transform, whose inverse is
    ``signs * hadamard_transform(y, n^-1/2)`` where H is symmetric (orders 2^k; ``hadamard_matrix`` gives all).

    Args:
        x: [..., n] float32 or bfloat16 (backend ``torch``: also float64).
        scale: applied to the sums.
        signs: [n], or [block] for the same signs in every block: any numbers, usually +-1.
        block: transform every ``block`` neighbours by themselves, that is by a block-diagonal matrix; None: n.
        backend: as in ``native.select_backend``.
        threads: of the CPU; None: as many as PyTorch uses.

    Returns:
        [..., n] in the type of ``x``.

    Raises:
        ConfigError: there is no matrix of this order here, a shape does not fit, or the backend cannot run.
    """
    order = x.shape[-1] if block is None and x.ndim else block
    if x.ndim == 0 or not order or x.shape[-1] % order:
        raise ConfigError(f"Hadamard transform of {list(x.shape)} in blocks of {order}; the block has to divide the last dimension")
    base = split_order(order)[0]
    if signs is not None and signs.shape not in ((order,), x.shape[-1:]):
        raise ConfigError(f"Hadamard transform of {list(x.shape)} with signs {list(signs.shape)}; accepted are {[order]}, {[x.shape[-1]]}")
    name, _ = native.select_backend(backend, x.device)
    if x.dtype not in native.TYPES and not (name == "torch" and x.dtype == torch.float64):
        raise ConfigError(f"Hadamard transform in {x.dtype}; accepted are {', '.join(map(str, native.TYPES))} (backend torch: float64)")
    if name == "torch":
        return _definition(x, scale, signs, order)
    factors = None if signs is None else signs.to(x.device, torch.float32).contiguous()
    return _compiled(x.contiguous(), scale, factors, order, _negatives(base), name, threads or 0)


def kronecker_transform(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The Kronecker product of two small matrices times the last dimension of ``x``: FlatQuant (arXiv:2410.09426, section 3.1).

    Args:
        x: [..., m n].
        left: [m, m].
        right: [n, n]; both in the type of ``x``.

    Returns:
        [..., m n]: (left (x) right) x, that is left X right^T of X [m, n], in (m + n) / (m n) of the products of the whole matrix.

    Raises:
        ConfigError: the shapes do not fit.
    """
    m, n = len(left), len(right)
    if left.shape != (m, m) or right.shape != (n, n) or x.shape[-1:] != (m * n,):
        raise ConfigError(f"Kronecker transform of {list(x.shape)} by {list(left.shape)} and {list(right.shape)}; m x n has to be the last")
    return (left @ (x.unflatten(-1, (m, n)) @ right.mT)).flatten(-2)


def split_order(order: int) -> tuple[int, int]:
    """b, 2^k with order = b x 2^k, b of ``BASES``. Raises ConfigError if there are none, and for orders over ``LARGEST_ORDER``."""
    for base in BASES:
        power = order // base
        if order % base == 0 and power & (power - 1) == 0 and 0 < order <= LARGEST_ORDER:
            return base, power
    raise ConfigError(
        f"no Hadamard matrix of order {order}; accepted are 2^k and {', '.join(f'{b} x 2^k' for b in BASES[1:])}, to {LARGEST_ORDER}"
    )


def hadamard_matrix(order: int) -> Tensor:
    """The matrix [order, order] of +-1 (float32) of ``hadamard_transform``. Raises ConfigError as ``split_order``."""
    base, power = split_order(order)
    matrix = _base_matrix(base)
    while len(matrix) < base * power:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return matrix


def _base_matrix(base: int) -> Tensor:
    """Of an order of ``BASES``."""
    if base == 1:
        return torch.ones(1, 1)
    prime = 13 if base == 28 else base - 1
    squares = {number * number % prime for number in range(1, prime)}
    characters = torch.tensor([0.0, *(1.0 if number in squares else -1.0 for number in range(1, prime))])
    numbers = torch.arange(prime)
    jacobsthal = characters[(numbers[:, None] - numbers) % prime]
    core = torch.ones(prime + 1, prime + 1)
    core[0, 0] = 0
    core[1:, 1:] = jacobsthal
    if base == 28:
        identity = torch.eye(prime + 1)
        return torch.kron(core, torch.tensor([[1.0, 1.0], [1.0, -1.0]])) + torch.kron(identity, torch.tensor([[1.0, -1.0], [-1.0, -1.0]]))
    core[1:, 0] = -1
    return core + torch.eye(base)


@cache
def _negatives(base: int) -> Tensor:
    """int32 [base]: bit j of number i is set where the small matrix has -1 in row i, column j."""
    return ((_base_matrix(base) < 0).long() << torch.arange(base)).sum(1).to(torch.int32)


def _definition(x: Tensor, scale: float, signs: Tensor | None, order: int) -> Tensor:
    base, power = split_order(order)
    wide = torch.promote_types(x.dtype, torch.float32)
    v = x.to(wide)
    if signs is not None:
        v = (v.unflatten(-1, (-1, len(signs))) * signs.to(x.device, wide)).flatten(-2)
    v = v.unflatten(-1, (-1, base, power))
    distance = 1
    while distance < power:
        a, b = v.unflatten(-1, (-1, 2, distance)).unbind(-2)
        v = torch.stack([a + b, a - b], -2).flatten(-3)
        distance *= 2
    columns = _base_matrix(base).to(x.device, wide).unbind(1)
    total = columns[0][:, None] * v[..., :1, :]
    for column, part in zip(columns[1:], v.unbind(-2)[1:], strict=True):
        total = total + column[:, None] * part[..., None, :]
    return (total * torch.tensor(scale, dtype=torch.float32).to(wide)).to(x.dtype).reshape(x.shape)


@torch.library.custom_op("megatron_ext::hadamard_transform", mutates_args=())
def _compiled(x: Tensor, scale: float, signs: Tensor | None, order: int, negatives: Tensor, backend: str, threads: int) -> Tensor:
    out = torch.empty_like(x)
    rows, count = x.numel() // order, 0 if signs is None else len(signs)
    native.call("hadamard", "hadamard", backend, threads, x, x.dtype, rows, order, len(negatives), negatives, scale, signs, count, out)
    return out


@_compiled.register_fake
def _(x: Tensor, *arguments: object) -> Tensor:
    return torch.empty_like(x)
