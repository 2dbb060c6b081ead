"""NVFP4: all backends have the bits of the definition, and the definition is TransformerEngine's arithmetic written out with ml_dtypes."""

import itertools
import math
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels import nvfp4_dequantize, nvfp4_quantize, nvfp4_quantize_both
from megatron_ext.kernels.amax import amax, amax_both
from megatron_ext.kernels.hadamard import hadamard_transform
from megatron_ext.kernels.minifloat import unpack_nibbles
from megatron_ext.kernels.quantized import NVFP4Tensor
from tests.kernels.backends import native_backends, on, uneven_matrix

SIGNS = torch.tensor([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1], dtype=torch.float32)
SHAPES = [(1, 1), (16, 16), (3, 130), (130, 3), (33, 70), (129, 257), (0, 5), (5, 0)]
"""Odd ones, and ones on both sides of strips of 16 rows, tiles of 128 rows and columns, and blocks of 16."""


BACKENDS = native_backends(lambda backend: amax(torch.ones(1, 1), backend=backend))
matrix = partial(uneven_matrix, block=16)


def parts(quantized: NVFP4Tensor) -> list[Tensor]:
    return [quantized.codes.cpu(), quantized.scales.view(torch.uint8).cpu(), quantized.amax.cpu().nan_to_num(-1.0)]


def equal(mine: NVFP4Tensor, expected: NVFP4Tensor) -> bool:
    return mine.shape == expected.shape and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(parts(mine), parts(expected), strict=True)
    )


def ways() -> Iterator[dict[str, object]]:
    for rounding, (block, signs) in itertools.product(("nearest", "stochastic"), (((1, 16), None), ((1, 16), SIGNS), ((16, 16), None))):
        yield {"rounding": rounding, "block": block, "signs": signs, "seed": 7}


def both(x: Tensor, way: dict[str, object], **others: object) -> tuple[NVFP4Tensor, ...]:
    """Rows, rows and columns of ``x``."""
    alone = {**way, **others}
    pair = {**alone, "column_signs": alone.pop("signs")}
    del pair["signs"]
    return (nvfp4_quantize(x, **way, **others), *nvfp4_quantize_both(x, **pair))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backends_have_the_bits_of_the_definition(backend: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x = matrix(*shape, dtype)
        there = on(x, backend)
        for way in ways():
            expected = both(x, way, backend="torch")
            for threads in (1, 3):
                for mine, theirs in zip(both(there, way, backend=backend, threads=threads), expected, strict=True):
                    assert equal(mine, theirs), (shape, way, threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_million_values_have_the_bits_of_the_definition(backend: str) -> None:
    """Any bits as float32, and halves between numbers of the format in blocks whose factor is 1, with their neighbours."""
    generator = torch.Generator().manual_seed(1)
    anything = torch.randint(-(2**31), 2**31 - 1, (512, 1024), generator=generator).to(torch.int32).view(torch.float32)
    halves = (torch.randint(-48, 49, (512, 1024), generator=generator) / 8).float()
    halves = (halves.view(torch.int32) + torch.randint(-1, 2, halves.shape, generator=generator).to(torch.int32)).view(torch.float32)
    halves[:, ::16] = 6.0 * 448
    halves[0, 0], halves[:, 16::32] = 6.0 * 448, 6.0
    for x in (anything.masked_fill(~anything.isfinite(), 0), anything, halves):
        for amax_given in (None, torch.tensor(2688.0)):
            way = {"rounding": "nearest", "block": (1, 16), "signs": None, "seed": 1, "amax": amax_given}
            expected = nvfp4_quantize(x, **way, backend="torch")
            assert equal(nvfp4_quantize(on(x, backend), **way, backend=backend), expected)
    assert len(expected.codes.unique()) > 100


@pytest.mark.parametrize("backend", BACKENDS)
def test_dequantized_bits_are_those_of_the_definition(backend: str) -> None:
    for shape, way in itertools.product(SHAPES, ways()):
        for quantized in both(matrix(*shape), way, backend="torch"):
            for dtype, undo in itertools.product((torch.float32, torch.bfloat16), (True, False)):
                mine = nvfp4_dequantize(quantized, dtype, undo_transform=undo, backend=backend)
                theirs = nvfp4_dequantize(quantized, dtype, undo_transform=undo, backend="torch")
                integers = torch.int16 if dtype == torch.bfloat16 else torch.int32
                assert mine.dtype == dtype and mine.shape == theirs.shape, (shape, way)
                assert torch.equal(mine.contiguous().view(integers), theirs.contiguous().view(integers)), (shape, way)


@pytest.mark.parametrize("backend", BACKENDS)
def test_amax(backend: str) -> None:
    for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16)):
        x = matrix(*shape, dtype)
        mine = amax_both(x, row_signs=SIGNS, column_signs=SIGNS, backend=backend, threads=2)
        expected = amax_both(x, row_signs=SIGNS, column_signs=SIGNS, backend="torch")
        assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True)), shape
        assert float(amax(x, backend=backend)) == (float(x.abs().max()) if x.numel() else 0.0)
    x = matrix(40, 40)
    x[3, 3] = -math.inf
    assert float(amax(x, backend=backend)) == math.inf
    x[39, 39] = math.nan
    assert amax(x, backend=backend).isnan()


def test_definition_is_the_published_arithmetic() -> None:
    """TransformerEngine's order of operations in NumPy, whose scalars divide and multiply in float32, and the casts of ml_dtypes."""
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    f = numpy.float32
    x = matrix(40, 128).numpy()
    tensor_scale = f(448.0 * 6.0) / numpy.abs(x).max()
    blocks = x.reshape(40, 8, 16)
    scales = numpy.minimum(numpy.abs(blocks).max(-1) * (tensor_scale * f(f(1) / f(6))), f(448)).astype(ml_dtypes.float8_e4m3fn)
    with numpy.errstate(divide="ignore"):
        factors = numpy.minimum(f(1) / (scales.astype(f) * (f(1) / tensor_scale)), numpy.finfo(f).max)
    codes = (blocks * factors[..., None]).astype(ml_dtypes.float4_e2m1fn).view(numpy.uint8).reshape(40, 128)
    mine = nvfp4_quantize(torch.from_numpy(x), backend="torch")
    assert torch.equal(mine.scales.view(torch.uint8), torch.from_numpy(scales.view(numpy.uint8)))
    assert torch.equal(unpack_nibbles(mine.codes), torch.from_numpy(codes))
    literal = numpy.minimum(numpy.abs(blocks).max(-1) / f(6) * tensor_scale, f(448))
    assert (literal != numpy.abs(blocks).max(-1) * (tensor_scale * f(f(1) / f(6)))).any(), "another order has other bits"


def test_columns_are_the_rows_of_the_transpose() -> None:
    x = matrix(70, 150)
    _, columns = nvfp4_quantize_both(x, column_signs=SIGNS)
    assert equal(columns, nvfp4_quantize(x.T, signs=SIGNS))
    assert not equal(columns, nvfp4_quantize(x.T, signs=-SIGNS.flip(0)))
    transformed = hadamard_transform(torch.nn.functional.pad(x.T, (0, 10)), 0.25, SIGNS, 16)
    assert torch.equal(columns.codes, nvfp4_quantize(transformed).codes)


def test_squares_share_codes_between_rows_and_columns() -> None:
    for shape, rounding in itertools.product(((64, 96), (33, 70), (1, 5)), ("nearest", "stochastic")):
        rows, columns = nvfp4_quantize_both(matrix(*shape), block=(16, 16), rounding=rounding, seed=3)
        assert torch.equal(nvfp4_dequantize(columns, torch.float32), nvfp4_dequantize(rows, torch.float32).T)
        assert torch.equal(columns.scales.view(torch.uint8), rows.scales.view(torch.uint8).T)
        assert rows.row_scales().shape == (shape[0], rows.codes.shape[1] // 8)
    rows, columns = nvfp4_quantize_both(matrix(64, 96))
    assert not torch.equal(nvfp4_dequantize(columns), nvfp4_dequantize(rows).T), "rows of 16 do not"


def test_quantization_is_close_and_keeps_what_is_exact() -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    for way in ways():
        back = nvfp4_dequantize(nvfp4_quantize(x, **way), torch.float32)
        assert 0.05 < float((back - x).norm() / x.norm()) < (0.2 if way["rounding"] == "stochastic" else 0.13), way
    exact = nvfp4_dequantize(nvfp4_quantize(x), torch.float32)
    once = nvfp4_quantize(exact, amax=nvfp4_quantize(x).amax)
    assert torch.equal(nvfp4_dequantize(once, torch.float32), exact)


def test_blocks_of_zeros_have_scale_zero() -> None:
    for block in ((1, 16), (16, 16)):
        quantized = nvfp4_quantize(torch.zeros(32, 32), block=block)
        assert not quantized.scales.view(torch.uint8).any() and not quantized.codes.any() and float(quantized.amax) == 0
        assert not nvfp4_dequantize(quantized).any()
    x = torch.ones(1, 32)
    x[0, :16] = 1e-9
    quantized = nvfp4_quantize(x)
    assert quantized.scales.view(torch.uint8).tolist()[0][0] == 0 and not nvfp4_dequantize(quantized)[0, :16].any()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    x = matrix(20, 40)
    x[4, 20] = bad
    for block in ((1, 16), (16, 16)):
        quantized = nvfp4_quantize(x, block=block)
        assert not quantized.amax.isfinite() and not nvfp4_dequantize(quantized, torch.float32)[4, 20].isfinite()
        assert ((quantized.scales.view(torch.uint8) & 0x7F) != 0x7F).all(), "no scale is NaN"
        given = nvfp4_dequantize(nvfp4_quantize(x, block=block, amax=torch.tensor(1000.0)), torch.float32)
        assert given.isfinite().all() and abs(float(given[4, 20])) > 900, "with a given amax, the largest number"


def test_stochastic_rounding_is_reproducible_unbiased_and_knows_its_place() -> None:
    x = torch.randn(48, 96, generator=torch.Generator().manual_seed(3))
    way = {"rounding": "stochastic", "amax": x.abs().max()}
    whole, columns = nvfp4_quantize_both(x, **way, column_amax=x.abs().max(), seed=11)
    assert equal(whole, nvfp4_quantize(x, **way, seed=11))
    assert not torch.equal(whole.codes, nvfp4_quantize(x, **way, seed=12).codes)
    part = nvfp4_quantize(x[5:, 32:80], **way, seed=11, offset=(5, 32))
    assert torch.equal(part.codes, whole.codes[5:, 16:40])
    _, part = nvfp4_quantize_both(x[16:, 32:80], **way, column_amax=x.abs().max(), seed=11, offset=(16, 32))
    assert torch.equal(part.codes, columns.codes[32:80, 8:])
    assert not torch.equal(nvfp4_quantize(x[5:, 32:80], **way, seed=11).codes, whole.codes[5:, 16:40]), "the place matters"

    count = 400
    mean = sum(nvfp4_dequantize(nvfp4_quantize(x, **way, seed=seed), torch.float32).double() for seed in range(count)) / count
    nearest = nvfp4_dequantize(nvfp4_quantize(x), torch.float32).double()
    spread = (x.abs().max() / 6) / count**0.5
    assert float((mean - x).abs().max()) < 5 * spread
    assert float((mean - x).norm()) < 0.2 * float((nearest - x).norm()), "the mean comes closer than nearest numbers do"


def test_wrong_arguments_are_refused() -> None:
    x = torch.ones(16, 16)
    for arguments, message in (
        ({"block": (1, 32)}, r"block is \(1, 32\)"),
        ({"rounding": "up"}, "rounding is 'up'"),
        ({"rounding": "stochastic"}, "seed is None"),
        ({"signs": torch.ones(8)}, r"signs are \[8\]"),
        ({"signs": SIGNS, "block": (16, 16)}, "with blocks of"),
        ({"offset": (0, 8)}, "offset is"),
        ({"backend": "gpu"}, "backend is 'gpu'; accepted are auto, torch"),
        ({"backend": "cuda"}, "tensor is on cpu; able to run there: torch, cpu"),
    ):
        with pytest.raises(ConfigError, match=message):
            nvfp4_quantize(x, **arguments)
    for wrong in (torch.ones(4), torch.ones(4, 4, dtype=torch.float64), torch.ones(4, 4, dtype=torch.float16)):
        with pytest.raises(ConfigError, match="NVFP4 of"):
            nvfp4_quantize(wrong)


def test_compiles_as_one_graph() -> None:
    compiled = torch.compile(lambda x: nvfp4_quantize(x, amax=x.abs().max()).codes, backend="eager", fullgraph=True)
    x = matrix(32, 48)
    assert torch.equal(compiled(x), nvfp4_quantize(x).codes)
