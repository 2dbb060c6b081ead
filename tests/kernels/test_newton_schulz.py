"""Newton-Schulz against its definition: the polynomials applied to singular values in float64."""

import importlib

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from megatron_ext.errors import ConfigError
from megatron_ext.kernels import newton_schulz
from megatron_ext.kernels.newton_schulz import COEFFICIENTS, JORDAN, polynomial, select_backend, select_polynomials
from tests.kernels.triton_programs import run_program

SHAPES = [(8, 8), (5, 20), (20, 5), (3, 6, 13), (2, 2, 9, 4), (1, 7), (7, 1), (1, 1), (4, 1, 6)]
EXPLICIT = [(2.0, -1.5, 0.5), [(3.0, -3.0, 1.0), (2.0, -1.5, 0.5)]]
RANGES = {"jordan": (0.68, 1.135), "you": (0.97, 1.04), "polar_express": (0.85, 1.145), "deepseek_v4": (0.999, 1.002)}
"""Of what singular values of at least 0.01 of the norm become."""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_singular_values(values: torch.Tensor, columns: int) -> torch.Tensor:
    rows = len(values)
    left, right = (torch.linalg.qr(random(size, rows))[0] for size in (rows, columns))
    return left * values @ right.mT


def error(mine: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest over the matrices of the Frobenius norm of the difference, relative to the expected norm."""
    difference, norm = (torch.linalg.vector_norm(part, dim=(-2, -1)) for part in (mine.double() - expected.double(), expected.double()))
    return float((difference / norm).max())


@pytest.mark.parametrize("coefficients", [*COEFFICIENTS, *EXPLICIT], ids=str)
@pytest.mark.parametrize("method", ["standard", "gram", "auto"])
def test_is_the_polynomial_of_the_singular_values(coefficients: object, method: str) -> None:
    for shape in SHAPES:
        G = random(*shape)
        mine = newton_schulz(G, coefficients=coefficients, method=method)
        assert (mine.shape, mine.dtype) == (G.shape, torch.float64)
        assert torch.equal(G, random(*shape)), "the argument is left as it was"
        assert error(mine, polynomial(G, coefficients=coefficients)) < 1e-10, shape


def test_sets_of_coefficients_differ() -> None:
    results = [newton_schulz(random(6, 9), coefficients=name) for name in COEFFICIENTS]
    assert all(error(one, other) > 1e-3 for i, one in enumerate(results) for other in results[:i])


def test_definition_is_the_polynomial_written_out() -> None:
    """Of a diagonal matrix, whose singular values are on the diagonal."""
    values = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    for name, safety in (("jordan", 1.0), ("you", 1.0), ("polar_express", 1.02)):
        x = values / (1.25**0.5 * safety)
        for a, b, c in COEFFICIENTS[name] * (5 // len(COEFFICIENTS[name])):
            x = a * x + b * x**3 + c * x**5
        torch.testing.assert_close(polynomial(values.diag(), 5, name), x.diag(), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_singular_values_end_near_one(coefficients: str) -> None:
    values = torch.logspace(-1.7, 0, 20, dtype=torch.float64)
    assert 0.01 < float(values.min() / values.norm()) < 0.012
    ended = torch.linalg.svdvals(newton_schulz(with_singular_values(values, 50), coefficients=coefficients))
    low, high = RANGES[coefficients]
    assert low <= float(ended.min()) <= float(ended.max()) <= high


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32), (1, 20), (33, 70)])
def test_is_torchs_bit_for_bit(shape: tuple[int, int]) -> None:
    for exponent in (-3, 0, 4):
        G = torch.stack([random(*shape, seed=seed).float() * 10.0**exponent for seed in range(3)])
        expected = [_zeropower_via_newtonschulz(matrix, JORDAN, 5, 1e-7) for matrix in G]
        for coefficients in ("jordan", JORDAN):
            mine = newton_schulz(G, 5, coefficients, "standard", dtype=torch.bfloat16, eps=1e-7)
            assert all(torch.equal(*pair) for pair in zip(mine, expected, strict=True))
        assert torch.equal(newton_schulz(G[0], 5, "jordan", "standard", dtype=torch.bfloat16), expected[0])
        assert not torch.equal(newton_schulz(G[0], 5, [*[JORDAN] * 4, (3.44, *JORDAN[1:])], "standard", dtype=torch.bfloat16), expected[0])


@pytest.mark.parametrize(
    ("dtype", "standard", "gram"), [(torch.float32, 2e-5, 2e-5), (torch.float16, 5e-3, 2e-2), (torch.bfloat16, 3e-2, 1e-1)], ids=str
)
def test_error_of_each_dtype_is_as_stated(dtype: torch.dtype, standard: float, gram: float) -> None:
    for shape in ((64, 256), (256, 64), (2, 48, 100)):
        G = random(*shape)
        for coefficients in COEFFICIENTS:
            expected = polynomial(G, coefficients=coefficients)
            for method, bound in (("standard", standard), ("gram", gram)):
                mine = newton_schulz(G, coefficients=coefficients, method=method, dtype=dtype)
                assert mine.dtype == dtype
                assert error(mine, expected) < bound, (shape, coefficients, method)
    assert error(newton_schulz(random(64, 256), dtype=dtype), polynomial(random(64, 256, seed=1))) > 1, "unrelated results are far apart"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_gram_stays_finite_where_rounding_makes_products_indefinite(dtype: torch.dtype, coefficients: str) -> None:
    G = with_singular_values(torch.logspace(0, -4, 64, dtype=torch.float64), 200)
    mine = newton_schulz(G, coefficients=coefficients, method="gram", dtype=dtype)
    assert float(torch.linalg.svdvals(mine.float()).max()) < 1.3
    beside = error(newton_schulz(G, coefficients=coefficients, method="standard", dtype=dtype), polynomial(G, coefficients=coefficients))
    assert error(mine, polynomial(G, coefficients=coefficients)) < 3 * beside + 1e-4


def test_auto_is_gram_for_oblong_matrices_except_in_bfloat16() -> None:
    for shape, dtype, expected in (
        ((8, 16), torch.float32, "gram"),
        ((16, 8), torch.float32, "gram"),
        ((8, 15), torch.float32, "standard"),
        ((8, 16), torch.bfloat16, "standard"),
    ):
        G = random(*shape)
        results = {method: newton_schulz(G, method=method, dtype=dtype) for method in ("auto", "gram", "standard")}
        assert not torch.equal(results["gram"], results["standard"])
        assert torch.equal(results["auto"], results[expected])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_zeros_stay_zeros_and_touch_no_neighbour(dtype: torch.dtype, method: str) -> None:
    G = random(3, 4, 9).to(dtype) * torch.tensor([1, 0, 1], dtype=dtype)[:, None, None]
    for eps in (0.0, 1e-20, 1e-7):
        mine = newton_schulz(G, method=method, eps=eps)
        assert not mine[1].any()
        assert torch.equal(mine[0], newton_schulz(G[[0, 0]], method=method)[0])
    assert not newton_schulz(G[1], method=method).any()
    assert not polynomial(G[1]).any()
    assert newton_schulz(G[:0]).shape == (0, 4, 9)
    assert newton_schulz(G[:, :0]).shape == (3, 0, 9)


@pytest.mark.parametrize("method", ["standard", "gram"])
def test_result_does_not_depend_on_the_scale(method: str) -> None:
    G = random(6, 20).float()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = newton_schulz(G, method=method, dtype=dtype)
        for exponent in (-100, -40, 30, 120):
            assert torch.equal(newton_schulz(G * 2.0**exponent, method=method, dtype=dtype, eps=0.0), expected), (dtype, exponent)
    for value in (65504.0, 6e-8):
        half = (G.sign() * value).half()
        expected = polynomial(half)
        assert error(newton_schulz(half, method=method), expected) < 2e-2
        assert error(newton_schulz(half, method=method, dtype=torch.float32), expected) < 2e-5
    assert float(newton_schulz(G * 1e-9, eps=1e-2).norm()) < 1e-2, "a norm below eps counts as eps"


def test_infinities_and_nans_are_not_hidden() -> None:
    for value in (float("inf"), float("nan")):
        G = random(2, 3, 8)
        G[1, 0, 0] = value
        mine = newton_schulz(G)
        assert mine[1].isnan().all() and mine[0].isfinite().all()


def test_steps() -> None:
    assert [len(select_polynomials(name, None)) for name in ("jordan", "you", "polar_express", "deepseek_v4")] == [5, 5, 5, 10]
    assert select_polynomials("jordan", 7) == (JORDAN,) * 7
    assert error(newton_schulz(random(4, 6), 3, "jordan"), polynomial(random(4, 6), 3, "jordan")) < 1e-10
    for steps, coefficients in ((5, "deepseek_v4"), (6, "polar_express"), (3, [JORDAN, JORDAN]), (0, "jordan")):
        with pytest.raises(ConfigError, match=f"steps are {steps}"):
            newton_schulz(random(4, 6), steps, coefficients)


def test_errors_say_what_is_accepted() -> None:
    for arguments, message in (
        ({"coefficients": "quintic"}, "polar_express"),
        ({"coefficients": (1.0, 2.0)}, "a, b, c"),
        ({"coefficients": []}, "a, b, c"),
        ({"method": "cubic"}, "standard, gram"),
        ({"backend": "cutlass"}, "blas, triton"),
        ({"dtype": torch.int32}, "float64"),
    ):
        with pytest.raises(ConfigError, match=message):
            newton_schulz(random(4, 6), **arguments)
    with pytest.raises(ConfigError, match="m, n"):
        newton_schulz(random(4))


def test_backend_is_chosen_by_one_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = importlib.import_module("megatron_ext.kernels.newton_schulz")
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert select_backend("auto", cpu, torch.float32) == ("blas", "auto: on cpu")
    with pytest.raises(ConfigError, match="needs a CUDA device, not cpu"):
        newton_schulz(random(4, 6).float(), backend="triton")
    monkeypatch.setattr(kernel, "_importable", lambda package: True)
    assert select_backend("auto", cuda, torch.bfloat16)[0] == "triton"
    assert select_backend("auto", cuda, torch.float64) == ("blas", "auto: triton needs float32, bfloat16 or float16, not float64")
    assert select_backend("blas", cuda, torch.bfloat16) == ("blas", "as asked for")
    monkeypatch.setattr(kernel, "_importable", lambda package: False)
    assert select_backend("auto", cuda, torch.bfloat16)[1] == "auto: triton needs the package triton, which cannot be imported"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ConfigError, match="interpreter"):
        select_backend("triton", cpu, torch.bfloat16)


def check_symmetric_products() -> None:
    """With borders inside tiles, strides, and stacks."""
    symmetric_product = importlib.import_module("megatron_ext.csrc.triton.newton_schulz").symmetric_product
    for dtype, bound in ((torch.float32, 2e-6), (torch.float16, 1e-3)):
        for X in (random(130, 70), random(70, 130).mT, random(2, 65, 64), random(1, 5), random(64, 1)):
            X = X.to(dtype)
            A = symmetric_product(X, X.mT, None, 1.0, 0.0)
            exact = X.double() @ X.mT.double()
            assert A.dtype == dtype and torch.equal(A, A.mT)
            assert error(A, exact) < bound
            beta = -0.3 * float(A.norm())
            exact = 0.5 * A.double() @ A.double() + beta * A.double()
            assert error(symmetric_product(A, A, A, 0.5, beta), exact) < bound
            assert error(symmetric_product(A, A, A, 0.5, 0.0), exact) > 0.1, "beta counts"


def check_triton_backend() -> None:
    """Newton-Schulz on these products is as near the definition as on those of BLAS."""
    for dtype in (torch.float32, torch.float16):
        for shape in ((20, 70), (3, 66, 40), (1, 9)):
            for method in ("standard", "gram"):
                G, expected = random(*shape), polynomial(random(*shape))
                ours, blas = (error(newton_schulz(G, method=method, dtype=dtype, backend=name), expected) for name in ("triton", "blas"))
                assert ours < 3 * blas + 3e-5, (dtype, shape, method, ours, blas)


@pytest.mark.parametrize("check", [check_symmetric_products, check_triton_backend], ids=lambda check: check.__name__)
def test_triton_twin_in_the_interpreter(check: object) -> None:
    run_program(check, interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_triton_on_a_gpu(dtype: torch.dtype) -> None:
    for shape in ((500, 300), (2, 256, 1024), (700, 700)):
        G = random(*shape)
        for method in ("standard", "gram"):
            ours, blas = (newton_schulz(G.cuda(), method=method, dtype=dtype, backend=name).cpu() for name in ("triton", "blas"))
            assert error(ours, polynomial(G)) < 1.5 * error(blas, polynomial(G)) + 1e-5
