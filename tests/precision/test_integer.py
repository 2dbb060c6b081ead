"""Integers against PyTorch's own quantizers, which none of us wrote, and against exact rational arithmetic."""

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor
from torch.ao.quantization.fx import _decomposed  # noqa: F401 - registers torch.ops.quantized_decomposed

from megatron_ext.errors import ConfigError
from megatron_ext.precision.integer import quantize_asymmetric, quantize_clipped, quantize_symmetric

BITS = (2, 3, 4, 8)


def matrix(rows: int = 64, columns: int = 96) -> Tensor:
    """Rows of very different sizes, some of one sign, one of zeros."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, rows)[:, None]
    x[3], x[4], x[5] = 0.0, x[4].abs(), -x[5].abs()
    return x


def away_from_ties(x: Tensor, scale: Tensor) -> Tensor:
    """Where x / scale and x * (1 / scale), which is what PyTorch rounds, cannot fall on different sides of a tie."""
    place = (x.double() / scale.double()[:, None]).remainder(1.0)
    return (place - 0.5).abs() > 1e-4


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_equals_pytorch_per_channel(bits: int) -> None:
    x = matrix()
    scale = (x.abs().amax(1) / (2 ** (bits - 1) - 1)).clamp_min(torch.finfo(torch.float32).tiny)
    zero = torch.zeros(len(x), dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero, 0, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    found, clear = quantize_symmetric(x, bits), away_from_ties(x, scale)
    assert torch.equal(found[clear], expected[clear])
    assert clear.double().mean() > 0.98
    assert not torch.equal(found, x)


@pytest.mark.parametrize("bits", BITS)
def test_asymmetric_equals_pytorch_per_token(bits: int) -> None:
    x = matrix()
    low, high = x.amin(1).clamp_max(0), x.amax(1).clamp_min(0)
    scale = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(torch.float32).tiny)
    zero = (-low / scale).round()
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero.to(torch.int32), 0, 0, 2**bits - 1)
    found, clear = quantize_asymmetric(x, bits), away_from_ties(x, scale)
    assert torch.equal(found[clear], expected[clear])
    assert clear.double().mean() > 0.98


def test_asymmetric_scales_are_those_of_pytorch() -> None:
    """Its codes, from scales and zero points that it chooses itself, for 8 bits."""
    x = matrix()[10:50].clamp(-1e5, 1e5)
    scales, zeros = torch.ops.quantized_decomposed.choose_qparams_per_token_asymmetric(x, torch.int8)
    codes = torch.ops.quantized_decomposed.quantize_per_token(x, scales, zeros, -128, 127, torch.int8)
    expected = torch.ops.quantized_decomposed.dequantize_per_token(codes, scales, zeros, -128, 127, torch.int8, torch.float32)
    difference = (quantize_asymmetric(x, 8) - expected).abs() / scales
    assert difference.max() < 1.01  # a zero point may be the other neighbour of a tie
    assert difference.median() < 1e-3


def exact_symmetric(row: list[float], bits: int) -> list[Fraction]:
    largest = 2 ** (bits - 1) - 1
    scale = max(abs(Fraction(value)) for value in row) / largest
    return [round(Fraction(value) / scale) * scale for value in row]


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_in_rational_arithmetic(bits: int) -> None:
    """Ties included: multiples of half a step, where the scale is a power of two."""
    largest = 2 ** (bits - 1) - 1
    row = [half / 2 for half in range(-2 * largest, 2 * largest + 1)]
    found = quantize_symmetric(torch.tensor([row]), bits)[0].tolist()
    assert found == [float(value) for value in exact_symmetric(row, bits)]
    assert len(set(found)) == 2**bits - 1


def test_asymmetric_uses_all_numbers_of_one_sided_rows() -> None:
    x = torch.rand(1, 1000, generator=torch.Generator().manual_seed(0)) * 15
    x[0, 0], x[0, 1] = 0.0, 15.0
    assert set(quantize_asymmetric(x, 4)[0].tolist()) == set(map(float, range(16)))
    assert len(quantize_symmetric(x, 4).unique()) == 8


@pytest.mark.parametrize("quantize", [quantize_symmetric, quantize_clipped, quantize_asymmetric])
def test_types_rows_and_zeros(quantize: Callable[[Tensor, int], Tensor]) -> None:
    x = matrix().double()
    assert quantize(x, 4).dtype == torch.float64
    assert quantize(x.bfloat16(), 4).dtype == torch.bfloat16
    assert torch.equal(quantize(x, 4)[3], torch.zeros(96, dtype=torch.float64))
    assert torch.equal(quantize(x, 4)[7:9], quantize(x[7:9], 4)), "a row depends on no other"
    assert torch.equal(quantize(x.view(4, 16, 96), 4).view(64, 96), quantize(x, 4))
    assert quantize(torch.empty(0, 5), 4).shape == (0, 5)
    x[1, 1] = torch.nan
    rows = quantize(x, 4).isnan()
    assert rows[1].all() and not rows[0].any()
    with pytest.raises(ConfigError, match="integers of 1 bits; accepted are 2 to 8"):
        quantize(x, 1)


def test_clipping_finds_the_best_of_all_scales() -> None:
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = x.abs().amax(1, keepdim=True) / 7
    grids = [(x / (whole * f)).round().clamp(-8, 7) * whole * f for f in (1 - step / 100 for step in range(80))]
    errors = torch.stack([((grid - x).abs() ** 2.4).sum(1) for grid in grids])
    found = ((quantize_clipped(x, 4) - x).abs() ** 2.4).sum(1)
    assert torch.allclose(found, errors.amin(0), rtol=1e-12)
    assert (found < errors[0]).all(), "clipping gains on normal numbers"
