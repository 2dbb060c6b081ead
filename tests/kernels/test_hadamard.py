"""Hadamard transforms: products with the matrix in float64, and the same bits from all backends."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels import hadamard_transform
from megatron_ext.kernels.hadamard import hadamard_matrix, kronecker_transform, split_order
from tests.kernels.backends import native_backends, on

ORDERS = [1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 12, 20, 28, 24, 40, 56, 48, 160, 448, 3 * 512]


BACKENDS = native_backends(lambda backend: hadamard_transform(torch.ones(1, 1), backend=backend))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(mine: Tensor, expected: Tensor) -> bool:
    integers = torch.int16 if expected.dtype == torch.bfloat16 else torch.int32
    return mine.dtype == expected.dtype and torch.equal(mine.cpu().view(integers), expected.view(integers))


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 24, 56, 160, 256])
def test_matrices_are_hadamards(order: int) -> None:
    H = hadamard_matrix(order)
    assert H.abs().eq(1).all() and torch.equal(H @ H.T, order * torch.eye(order))


def test_powers_of_two_are_sylvesters() -> None:
    expected = torch.ones(1, 1)
    for _ in range(5):
        expected = torch.cat([torch.cat([expected, expected], 1), torch.cat([expected, -expected], 1)])
        assert torch.equal(hadamard_matrix(len(expected)), expected)
    assert torch.equal(hadamard_matrix(48), torch.kron(hadamard_matrix(12), hadamard_matrix(4)))


@pytest.mark.parametrize("order", ORDERS)
def test_definition_is_the_product_with_the_matrix(order: int) -> None:
    H, x, signs = hadamard_matrix(order).double(), random(3, order).double(), random(order, seed=1).sign().double()
    signs[0] = -1
    expected = (x * signs) @ H.T * 0.3125
    torch.testing.assert_close(hadamard_transform(x, 0.3125, signs, backend="torch"), expected, rtol=1e-12, atol=1e-12 * order)
    mine = hadamard_transform(x.float(), 0.3125, signs)
    assert float((mine.double() - expected).norm() / expected.norm()) < 1e-6
    if order > 1:
        assert float((hadamard_transform(x.float(), 0.3125) - expected).norm() / expected.norm()) > 0.1, "signs matter"
    whole = hadamard_transform((x * 8).round().float())
    assert torch.equal(whole.double(), (x * 8).round() @ H.T), "sums of integers are exact"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backends_have_the_bits_of_the_definition(backend: str, dtype: torch.dtype) -> None:
    for order, rows in itertools.product(ORDERS, (1, 7)):
        x = random(rows, order, dtype=dtype)
        for signs in (None, random(order, seed=2).sign()):
            mine = hadamard_transform(on(x, backend), order**-0.5, signs, backend=backend, threads=2)
            assert same_bits(mine, hadamard_transform(x, order**-0.5, signs, backend="torch")), (order, rows)
    x = random(4, 64, dtype=dtype)
    assert not same_bits(hadamard_transform(x, 0.125), hadamard_transform(x.flip(1), 0.125, backend="torch"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_orders(backend: str) -> None:
    for order in (32768, 28 * 1024, 20 * 1024, 12 * 2048):
        x = random(2, order)
        mine = hadamard_transform(on(x, backend), order**-0.5, backend=backend)
        assert same_bits(mine, hadamard_transform(x, order**-0.5, backend="torch"))
        assert math.isclose(float(mine.norm()), float(x.norm()), rel_tol=1e-5), "lengths are kept"


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks(backend: str) -> None:
    x, signs = random(5, 3, 96), random(96, seed=3).sign()
    for block in (1, 2, 16, 32, 12, 48, 96):
        H = torch.kron(torch.eye(96 // block), hadamard_matrix(block))
        for given in (signs, signs[:block]):
            full = signs if len(given) == 96 else given.repeat(96 // block)
            mine = hadamard_transform(x, 0.25, given, block, backend=backend)
            torch.testing.assert_close(mine, (x * full) @ H.T * 0.25, rtol=1e-5, atol=1e-5)
            assert same_bits(mine, hadamard_transform(x, 0.25, given, block, backend="torch"))


def test_twice_is_the_identity() -> None:
    x, signs = random(4, 512), random(512, seed=4).sign()
    torch.testing.assert_close(signs * hadamard_transform(hadamard_transform(x, 512**-0.5, signs), 512**-0.5), x, rtol=1e-5, atol=1e-5)


def test_special_values_and_shapes() -> None:
    for backend in ("cpu", "torch"):
        assert hadamard_transform(torch.zeros(0, 8), backend=backend).shape == (0, 8)
        assert hadamard_transform(torch.tensor([math.inf, 1.0]), backend=backend).tolist() == [math.inf, math.inf]
        assert hadamard_transform(torch.tensor([math.nan, 1.0]), backend=backend).isnan().all()
        assert hadamard_transform(random(6, 4).T[:, :4], backend=backend).shape == (4, 4)


def test_kronecker_pairs() -> None:
    x, left, right = random(3, 7, 24), random(4, 4), random(6, 6)
    torch.testing.assert_close(kronecker_transform(x, left, right), x @ torch.kron(left, right).T, rtol=1e-5, atol=1e-4)
    pair = kronecker_transform(random(2, 96), hadamard_matrix(12), hadamard_matrix(8))
    torch.testing.assert_close(pair, hadamard_transform(random(2, 96)), rtol=1e-5, atol=1e-4)
    with pytest.raises(ConfigError, match="Kronecker transform of"):
        kronecker_transform(x, left, left)


def test_orders_without_a_matrix_are_refused() -> None:
    for order in (3, 5, 6, 7, 14, 36, 44, 100, 65536):
        with pytest.raises(ConfigError, match=f"no Hadamard matrix of order {order}; accepted are 2"):
            hadamard_transform(torch.ones(order))
    assert [split_order(order) for order in (5120, 14336, 12288, 4096)] == [(20, 256), (28, 512), (12, 1024), (1, 4096)]
    for arguments, message in (
        ({"block": 24}, "block has to divide"),
        ({"signs": torch.ones(8)}, r"signs \[8\]"),
        ({"backend": "cuda"}, "tensor is on cpu"),
    ):
        with pytest.raises(ConfigError, match=message):
            hadamard_transform(torch.ones(2, 32), **arguments)
    with pytest.raises(ConfigError, match="float64"):
        hadamard_transform(torch.ones(2, 32, dtype=torch.float64))
