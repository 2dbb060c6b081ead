"""FP8 and MXFP8: all backends have the bits of the definition, and the definition is that of ml_dtypes' casts in NumPy."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.fp8_quantize import BLOCKS, fp8_dequantize, fp8_quantize, fp8_quantize_both
from megatron_ext.kernels.minifloat import LARGEST
from megatron_ext.kernels.quantized import FP8Tensor
from tests.kernels.backends import native_backends, on, uneven_matrix

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SHAPES = [(1, 1), (16, 32), (3, 130), (130, 3), (33, 70), (129, 257), (0, 5), (5, 0)]
"""Odd ones, and ones on both sides of parts of 32 values and of tiles of 128 rows and columns."""


BACKENDS = native_backends(lambda backend: fp8_quantize(torch.ones(1, 1), backend=backend))


def parts(quantized: FP8Tensor) -> list[Tensor]:
    scales = quantized.scales.view(torch.uint8) if quantized.scales.dtype == torch.float8_e8m0fnu else quantized.scales.nan_to_num(-1.0)
    return [quantized.codes.cpu(), scales.cpu(), quantized.amax.cpu().nan_to_num(-1.0)]


def equal(mine: FP8Tensor, expected: FP8Tensor) -> bool:
    about = [(each.shape, each.block, each.dtype) for each in (mine, expected)]
    pairs = zip(parts(mine), parts(expected), strict=True)
    return about[0] == about[1] and all(a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def ways() -> Iterator[dict[str, object]]:
    for scaling, dtype in itertools.product(BLOCKS, (E4M3, E5M2)):
        yield {"scaling": scaling, "dtype": dtype}
    yield from ({"scaling": scaling, "power_of_two": True} for scaling in BLOCKS if scaling != "mx")


def both(x: Tensor, **way: object) -> tuple[FP8Tensor, ...]:
    """Rows, rows and columns of ``x``."""
    return (fp8_quantize(x, **way), *fp8_quantize_both(x, **way))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backends_have_the_bits_of_the_definition(backend: str, dtype: torch.dtype) -> None:
    for shape, way in itertools.product(SHAPES, ways()):
        x = uneven_matrix(*shape, dtype)
        for given in ({}, {"amax": torch.tensor(3.5), "column_amax": torch.tensor(2.5)}):
            expected = fp8_quantize_both(x, **way, **given, backend="torch")
            for threads in (1, 3) if shape == (129, 257) else (1,):
                mine = fp8_quantize_both(on(x, backend), **way, **given, backend=backend, threads=threads)
                assert all(equal(a, b) for a, b in zip(mine, expected, strict=True)), (shape, way, given, threads)
        assert equal(fp8_quantize(on(x, backend), **way, backend=backend), fp8_quantize(x, **way, backend="torch")), (shape, way)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_million_values_have_the_bits_of_the_definition(backend: str) -> None:
    """Any bits as float32, and halves between numbers of the formats where the factor is 1, with their neighbours."""
    generator = torch.Generator().manual_seed(1)
    anything = torch.randint(-(2**31), 2**31 - 1, (1024, 1024), generator=generator).to(torch.int32).view(torch.float32)
    for way in ways():
        if way["scaling"] in ("rowwise", "1x128"):
            continue
        numbers = torch.arange(127, dtype=torch.uint8).view(way.get("dtype", E4M3)).float()
        numbers = numbers[numbers.isfinite()]
        middles = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2]).view(torch.int32)
        picked = middles[torch.randint(len(middles), (1024, 1024), generator=generator)]
        near = (picked + torch.randint(-1, 2, picked.shape, generator=generator).to(torch.int32)).clamp(min=0).view(torch.float32)
        largest = torch.tensor(LARGEST[way.get("dtype", E4M3)])
        for x, given in ((anything, None), (anything, largest), (near, largest)):
            expected = fp8_quantize(x, **way, amax=given, backend="torch")
            assert equal(fp8_quantize(on(x, backend), **way, amax=given, backend=backend), expected), way
        assert len(expected.codes.unique()) > 100
        assert not torch.equal(fp8_quantize(near * (1 + 2.0**-20), **way, amax=largest).codes, expected.codes), "a few ulp are seen"


@pytest.mark.parametrize("backend", BACKENDS)
def test_dequantized_bits_are_those_of_the_definition(backend: str) -> None:
    for shape, way in itertools.product(SHAPES, ways()):
        x = uneven_matrix(*shape)
        if x.numel() > 100:
            x[2, 1], x[1, 2] = math.nan, math.inf
        for quantized, dtype in itertools.product(both(x, **way, backend="torch"), (torch.float32, torch.bfloat16)):
            here = FP8Tensor(
                *(on(t, backend) for t in (quantized.codes, quantized.scales, quantized.amax)), quantized.block, quantized.dtype
            )
            mine = fp8_dequantize(here, dtype, backend=backend, threads=2).cpu()
            theirs = fp8_dequantize(quantized, dtype, backend="torch")
            assert mine.dtype == dtype and torch.equal(mine.isnan(), theirs.isnan()), (shape, way)
            integers = torch.int16 if dtype == torch.bfloat16 else torch.int32
            assert torch.equal(mine.nan_to_num(7.0).view(integers), theirs.nan_to_num(7.0).view(integers)), (shape, way)
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    for dtype in (E4M3, E5M2):
        every = FP8Tensor(codes, torch.ones(1, 1), torch.ones(1, 1), (16, 16), dtype)
        expected = codes.view(dtype).float()
        assert torch.equal(fp8_dequantize(every, torch.float32).nan_to_num(9e30), expected.nan_to_num(9e30))


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_definition_is_that_of_other_casts(dtype: torch.dtype) -> None:
    """Scales in NumPy, whose scalars divide in float32, and codes by the casts of ml_dtypes."""
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    theirs = getattr(ml_dtypes, str(dtype).removeprefix("torch."))
    largest = numpy.float32(ml_dtypes.finfo(theirs).max)
    x = uneven_matrix(256, 384).numpy() + numpy.float32(1e-9)
    for scaling, (height, width) in BLOCKS.items():
        height, width = height or 256, width or 384
        blocks = x.reshape(256 // height, height, 384 // width, width)
        amax = numpy.abs(blocks).max((1, 3))
        factors = largest / amax
        mine = fp8_quantize(torch.from_numpy(x), scaling=scaling, dtype=dtype, backend="torch")
        if scaling == "mx":
            exponents = numpy.ceil(numpy.log2(amax.astype(numpy.float64) / largest))
            assert numpy.array_equal(mine.scales.view(torch.uint8).numpy(), exponents + 127)
            factors = numpy.exp2(-exponents).astype(numpy.float32)
        else:
            assert numpy.array_equal(mine.scales.numpy(), numpy.float32(1) / factors)
        codes = numpy.clip(blocks * factors[:, None, :, None], -largest, largest).astype(theirs).view(numpy.uint8)
        assert numpy.array_equal(mine.codes.numpy(), codes.reshape(256, 384)), scaling
        assert numpy.array_equal(mine.amax.numpy(), amax)


def test_columns_are_the_rows_of_the_transpose() -> None:
    x = uneven_matrix(70, 150)
    for way in ways():
        rows, columns = fp8_quantize_both(x, **way)
        assert equal(rows, fp8_quantize(x, **way)) and equal(columns, fp8_quantize(x.T, **way)), way
        same = torch.equal(fp8_dequantize(columns, torch.float32), fp8_dequantize(rows, torch.float32).T)
        square, exact = way["scaling"] in ("tensorwise", "128x128"), way["scaling"] == "mx" or "power_of_two" in way
        assert same == square or exact, "one scale for a square is one for its transpose"
        assert torch.equal(rows.codes.T, columns.codes) == square, way


def test_powers_of_two_cost_no_bit() -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    for scaling in BLOCKS:
        power = fp8_quantize(x, scaling=scaling, power_of_two=True)
        scales = power.scales.float()
        assert torch.equal(torch.exp2(scales.log2().round()), scales)
        again = fp8_quantize(fp8_dequantize(power, torch.float32), scaling=scaling, power_of_two=True, amax=power.amax)
        assert equal(again, power)
        usual = fp8_quantize(x, scaling=scaling).scales.float()
        assert (scales >= usual).all() and (scales < 2 * usual).all(), "the next one at or above"
        assert scaling == "mx" or not torch.equal(scales, usual)
    assert float(fp8_quantize(torch.full((1, 32), 448.0), scaling="mx").scales.float()) == 1.0
    assert float(fp8_quantize(torch.full((1, 32), 449.0), scaling="mx").scales.float()) == 2.0, "nothing saturates"


def test_errors_are_those_of_the_format() -> None:
    x = torch.randn(130, 300, generator=torch.Generator().manual_seed(3)) + 0.01
    for way in ways():
        back = fp8_dequantize(fp8_quantize(x, **way), torch.float32)
        relative = 2.0**-4 if way.get("dtype", E4M3) == E4M3 else 2.0**-3
        smallest = fp8_quantize(x, **way).scales.float().max() * (2.0**-10 if way.get("dtype", E4M3) == E4M3 else 2.0**-17)
        assert ((back - x).abs() <= relative * 1.0001 * x.abs() + smallest).all(), way
        assert float((back - x).norm() / x.norm()) > relative / 10


def test_zeros_and_what_is_not_finite() -> None:
    for backend, way in itertools.product(("cpu", "torch"), ways()):
        zeros = fp8_quantize(torch.zeros(40, 40), **way, backend=backend)
        assert not zeros.codes.any() and not fp8_dequantize(zeros, backend=backend).any()
        assert (zeros.scales.float() == (2.0**-127 if way["scaling"] == "mx" else 1.0)).all()
        for bad in (math.inf, -math.inf, math.nan):
            x = torch.ones(40, 300)
            x[4, 20] = bad
            quantized = fp8_quantize(x, **way, backend=backend)
            assert not fp8_dequantize(quantized, torch.float32, backend=backend)[4, 20].isfinite(), (way, bad)
            given = fp8_dequantize(fp8_quantize(x, **way, amax=torch.tensor(8.0), backend=backend), torch.float32, backend=backend)
            expected = math.nan if bad != bad else math.copysign(given[4, 20].abs(), bad)
            assert given[4, 20].isnan() if bad != bad else (float(given[4, 20]) == expected and abs(expected) >= 8), (way, bad)
            assert torch.equal(given.isfinite(), ~x.isnan()), "nothing else is lost"


def test_amax_of_a_whole_of_which_this_is_a_part() -> None:
    x = uneven_matrix(256, 384)
    for way in ways():
        whole, columns = fp8_quantize_both(x, **way)
        part = fp8_quantize(x[128:], **way, amax=whole.amax[128 // whole.block[0] :] if whole.block[0] < 256 else whole.amax)
        assert torch.equal(part.codes, whole.codes[128:]), way
        if way["scaling"] == "rowwise":
            _, half = fp8_quantize_both(x[:128], **way, column_amax=columns.amax)
            assert torch.equal(half.codes, columns.codes[:, :128])
            assert not torch.equal(fp8_quantize(x[:128].T, **way).codes, columns.codes[:, :128]), "its own amax is another"


def test_wrong_arguments_are_refused() -> None:
    x = torch.ones(16, 16)
    for arguments, message in (
        ({"scaling": "2x2"}, "scaling is '2x2'; accepted are tensorwise, rowwise, 1x128, 128x128, mx"),
        ({"dtype": torch.float16}, "dtype is torch.float16"),
        ({"amax": torch.ones(3), "scaling": "rowwise"}, r"amax is \[3\].*accepted are \[\], \[16, 1\]"),
        ({"backend": "gpu"}, "backend is 'gpu'; accepted are auto, torch"),
        ({"backend": "cuda"}, "tensor is on cpu; able to run there: torch, cpu"),
    ):
        with pytest.raises(ConfigError, match=message):
            fp8_quantize(x, **arguments)
    for wrong in (torch.ones(4), torch.ones(4, 4, dtype=torch.float64)):
        with pytest.raises(ConfigError, match="FP8 of"):
            fp8_quantize(wrong)
    with pytest.raises(ConfigError, match="dequantized to torch.float16"):
        fp8_dequantize(fp8_quantize(x), torch.float16)


def test_compiles_as_one_graph() -> None:
    compiled = torch.compile(lambda x: fp8_quantize(x, scaling="1x128").codes, backend="eager", fullgraph=True)
    x = uneven_matrix(32, 48)
    assert torch.equal(compiled(x), fp8_quantize(x, scaling="1x128").codes)
