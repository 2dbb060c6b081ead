"""MXFP4: all backends have the bits of the definition, and the definition is that of ml_dtypes' casts in NumPy."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.hadamard import hadamard_transform
from megatron_ext.kernels.minifloat import unpack_nibbles
from megatron_ext.kernels.mxfp4_quantize import mxfp4_dequantize, mxfp4_quantize, mxfp4_quantize_both
from megatron_ext.kernels.quantized import MXFP4Tensor
from tests.kernels.backends import native_backends, on, uneven_matrix

SIGNS = torch.randint(0, 2, (32,), generator=torch.Generator().manual_seed(5)).float() * 2 - 1
SHAPES = [(1, 1), (32, 32), (3, 130), (130, 3), (33, 70), (129, 257), (0, 5), (5, 0)]
"""Odd ones, and ones on both sides of strips of 16 rows, tiles of 128 rows and columns, and blocks of 32."""


BACKENDS = native_backends(lambda backend: mxfp4_quantize(torch.ones(1, 1), backend=backend))


def equal(mine: MXFP4Tensor, expected: MXFP4Tensor) -> bool:
    return (
        (mine.shape, mine.square) == (expected.shape, expected.square)
        and torch.equal(mine.codes.cpu(), expected.codes)
        and torch.equal(mine.scales.cpu(), expected.scales)
    )


def ways() -> Iterator[dict[str, object]]:
    for seed, (square, signs) in itertools.product((None, 7), ((False, None), (False, SIGNS), (True, None))):
        yield {"seed": seed, "square": square, "signs": signs}


def three(x: Tensor, way: dict[str, object], **others: object) -> tuple[MXFP4Tensor, ...]:
    """Rows, rows and columns of ``x``."""
    return (mxfp4_quantize(x, **way, stream=3, **others), *mxfp4_quantize_both(x, **way, column_signs=way["signs"], **others))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backends_have_the_bits_of_the_definition(backend: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x = uneven_matrix(*shape, dtype)
        for way in ways():
            expected = three(x, way, offset=(64, 32), backend="torch")
            for threads in (1, 3):
                for mine, theirs in zip(
                    three(on(x, backend), way, offset=(64, 32), backend=backend, threads=threads), expected, strict=True
                ):
                    assert equal(mine, theirs), (shape, way, threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_million_values_have_the_bits_of_the_definition(backend: str) -> None:
    """Any bits as float32, and halves between numbers of the format in blocks whose scale is 1, with their neighbours."""
    generator = torch.Generator().manual_seed(1)
    anything = torch.randint(-(2**31), 2**31 - 1, (512, 1024), generator=generator).to(torch.int32).view(torch.float32)
    tiny = (anything.view(torch.int32) & -0x70000001).view(torch.float32)
    halves = (torch.randint(-48, 49, (512, 1024), generator=generator) / 8).float()
    halves = (halves.view(torch.int32) + torch.randint(-1, 2, halves.shape, generator=generator).to(torch.int32)).view(torch.float32)
    halves[:, ::32] = 6.0
    for x, seed in itertools.product((anything.masked_fill(~anything.isfinite(), 0), anything, tiny, halves), (None, 3)):
        expected = mxfp4_quantize_both(x, seed=seed, backend="torch")
        mine = mxfp4_quantize_both(on(x, backend), seed=seed, backend=backend)
        assert all(equal(a, b) for a, b in zip(mine, expected, strict=True)), seed
    assert len(expected[0].codes.unique()) > 100


def test_definition_is_that_of_ml_dtypes() -> None:
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    x = uneven_matrix(40, 128).numpy()
    blocks = x.reshape(40, 4, 32)
    amax = numpy.abs(blocks).max(-1)
    powers = numpy.exp2(numpy.ceil(numpy.log2(numpy.maximum(amax.astype(numpy.float64) / 6, 2.0**-127)))).astype(numpy.float32)
    codes = (blocks / powers[..., None]).astype(ml_dtypes.float4_e2m1fn).view(numpy.uint8).reshape(40, 128)
    mine = mxfp4_quantize(torch.from_numpy(x), backend="torch")
    scales = powers.astype(ml_dtypes.float8_e8m0fnu).view(numpy.uint8)
    assert torch.equal(mine.scales, torch.from_numpy(scales))
    assert torch.equal(unpack_nibbles(mine.codes), torch.from_numpy(codes))
    down = (blocks / (powers / 2)[..., None]).astype(ml_dtypes.float4_e2m1fn).view(numpy.uint8).reshape(40, 128)
    assert (down != codes).any(), "other scales have other codes"


def test_columns_are_the_rows_of_the_transpose() -> None:
    x = uneven_matrix(70, 150)
    for way in ways():
        signs = way.pop("signs")
        _, columns = mxfp4_quantize_both(x, **way, column_signs=signs, offset=(32, 64))
        assert equal(columns, mxfp4_quantize(x.T, **way, stream=1, signs=signs, offset=(64, 32))), way
    assert not equal(mxfp4_quantize(x, signs=SIGNS), mxfp4_quantize(x, signs=-SIGNS.flip(0)))
    transformed = hadamard_transform(torch.nn.functional.pad(x, (0, 10)), 32**-0.5, SIGNS, 32)
    assert torch.equal(mxfp4_quantize(x, signs=SIGNS).codes, mxfp4_quantize(transformed).codes)


def test_squares_share_codes_between_rows_and_columns() -> None:
    for shape in ((64, 96), (33, 70), (1, 5)):
        rows, columns = mxfp4_quantize_both(uneven_matrix(*shape), square=True)
        cut = [mxfp4_dequantize(each, torch.float32)[: each.shape[0], : each.shape[1]] for each in (rows, columns)]
        assert torch.equal(cut[1], cut[0].T) and torch.equal(columns.scales, rows.scales.T)
    rows, columns = mxfp4_quantize_both(uneven_matrix(64, 96))
    assert not torch.equal(mxfp4_dequantize(columns), mxfp4_dequantize(rows).T), "rows of 32 do not"


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    x = uneven_matrix(40, 64)
    x[4, 40] = bad
    for square in (False, True):
        quantized = mxfp4_quantize(x, square=square)
        back = mxfp4_dequantize(quantized, torch.float32)[4, 40]
        assert back.isnan() if math.isnan(bad) else float(back.abs()) > 1e38
        assert equal(quantized, mxfp4_quantize(x, square=square, backend="torch"))


def test_stochastic_rounding_knows_its_place_and_is_unbiased() -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    whole, columns = mxfp4_quantize_both(x, seed=11)
    assert not torch.equal(whole.codes, mxfp4_quantize(x, seed=12).codes)
    assert not torch.equal(whole.codes, mxfp4_quantize(x, seed=11, stream=1).codes)
    part = mxfp4_quantize(x[5:, 32:96], seed=11, offset=(5, 32))
    assert torch.equal(part.codes, whole.codes[5:, 16:48])
    _, part = mxfp4_quantize_both(x[32:, 32:96], seed=11, offset=(32, 32))
    assert torch.equal(part.codes, columns.codes[32:96, 16:])
    count = 400
    mean = sum(mxfp4_dequantize(mxfp4_quantize(x, seed=seed), torch.float32).double() for seed in range(count)) / count
    nearest = mxfp4_dequantize(mxfp4_quantize(x), torch.float32).double()
    assert float((mean - x).norm()) < 0.2 * float((nearest - x).norm()), "the mean comes closer than nearest numbers do"


def test_wrong_arguments_are_refused() -> None:
    x = torch.ones(32, 32)
    for arguments, message in (
        ({"signs": torch.ones(16)}, r"signs are \[16\]"),
        ({"signs": SIGNS, "square": True}, "with square: True"),
        ({"offset": (0, 16)}, "offset is"),
        ({"backend": "cuda"}, "tensor is on cpu; able to run there: torch, cpu"),
    ):
        with pytest.raises(ConfigError, match=message):
            mxfp4_quantize(x, **arguments)
    for wrong in (torch.ones(4), torch.ones(4, 4, dtype=torch.float64), torch.ones(4, 4, dtype=torch.float16)):
        with pytest.raises(ConfigError, match="MXFP4 of"):
            mxfp4_quantize(wrong)


def test_compiles_as_one_graph() -> None:
    compiled = torch.compile(lambda x: mxfp4_quantize(x).codes, backend="eager", fullgraph=True)
    x = uneven_matrix(32, 64)
    assert torch.equal(compiled(x), mxfp4_quantize(x).codes)
