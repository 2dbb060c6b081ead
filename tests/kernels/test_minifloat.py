"""Formats of 4 and 8 bits: the definitions in PyTorch, the C++ core, ml_dtypes and NVIDIA's headers on a million numbers."""

import ctypes
import importlib.util
import math
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_ext.kernels import build
from megatron_ext.kernels.minifloat import (
    decode_e2m1,
    decode_e8m0,
    encode_e2m1,
    encode_e2m1_stochastic,
    encode_e8m0,
    encode_fp8,
    pack_nibbles,
    unpack_nibbles,
)

FORMATS = ("e2m1", "e4m3", "e5m2", "e8m0")
"""In the order of minifloat_probe.cpp."""
DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


NO_DEVICE = "#define NV_IF_ELSE_TARGET(condition, yes, no) no\n#define NV_IF_TARGET(condition, ...)\n"
"""For nv/target, which the wheel of Triton has not: which code is for which device, here none for any."""


def nvidia_headers() -> Path | None:
    """A folder with cuda_fp4.h: that of the CUDA toolkit, or of the wheel of Triton."""
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    folders = [Path(home) / "include" for home in homes if home]
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        folders.append(Path(triton.origin).parent / "backends/nvidia/include")
    return next((folder for folder in folders if (folder / "cuda_fp4.h").is_file()), None)


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """minifloat_probe.cpp, with NVIDIA's encoders where their headers are."""
    folder = tmp_path_factory.mktemp("probe")
    library, headers = folder / "probe.so", nvidia_headers()
    include = [f"-I{build.SOURCES / folder}" for folder in ("common", "cpu")]
    nvidia = ["-DWITH_NVIDIA", "-isystem", str(headers)] if headers else []
    if headers and not (headers / "nv/target").is_file():
        (folder / "nv").mkdir()
        (folder / "nv/target").write_text(NO_DEVICE)
        nvidia += ["-isystem", str(folder)]
    flags = ["-O1" if flag == "-O3" else flag for flag in build.FLAGS]
    source = str(Path(__file__).with_name("minifloat_probe.cpp"))
    subprocess.run([build.find_compiler(), *flags, *include, *nvidia, source, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def probed(function: Callable[..., None], x: Tensor, *first: int) -> Tensor:
    codes = torch.empty(x.numel(), dtype=torch.uint8)
    function(*first, ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.numel()), ctypes.c_void_p(codes.data_ptr()))
    return codes


def definition(name: str, x: Tensor) -> Tensor:
    if name == "e2m1":
        return encode_e2m1(x)
    return encode_e8m0(x.abs()) if name == "e8m0" else encode_fp8(x, DTYPES[name])


def numbers() -> Tensor:
    """A million floats: midpoints of every format and their neighbours, whatever bits, zeros, subnormals, infinities, NaN."""
    values = [decode_e2m1(torch.arange(8)), *(torch.arange(127, dtype=torch.uint8).view(dtype).float() for dtype in DTYPES.values())]
    values = [each[each.isfinite()].double() for each in [*values, decode_e8m0(torch.arange(255, dtype=torch.uint8))]]
    beyond = torch.tensor([7.0, 464.0, 61440.0])  # half-way to what would be the next numbers
    middles = torch.cat([*(torch.cat([each, (each[1:] + each[:-1]) / 2]) for each in values), beyond]).float()
    bits = middles.view(torch.int32)
    exact = torch.cat([bits, bits + 1, (bits - 1).clamp(min=0), bits + 2, (bits - 2).clamp(min=0)])
    special = torch.tensor([0, 1, 2, 0x7FFFFF, 0x800000, 0x3FFFFF, 0x400000, 0x400001, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000])
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(0, 2**31 - 1, (500_000,), generator=generator).to(torch.int32)
    usual = (torch.randn(499_984, generator=generator) * 2).view(torch.int32) & 0x7FFFFFFF
    positive = torch.cat([exact, special.to(torch.int32), anything, usual])
    signed = torch.cat([positive, positive | -(2**31)]).view(torch.float32)
    return signed[: len(signed) // 16 * 16].contiguous()


def test_the_million_holds_what_matters() -> None:
    x = numbers()
    assert len(x) > 1_000_000
    for value in (0.25, 5.0, 0.0, math.inf, 448.0, 464.0, 2.0**-10, 2.0**-149, 6.0):
        assert (x == value).any() and (x == -value).any(), value
    assert x.isnan().any()
    assert (x == torch.nextafter(torch.tensor(0.25), torch.tensor(1.0))).any()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("function", ["encode_scalars", "encode_vectors4", "encode_vectors16"])
def test_core_is_the_definition(name: str, function: str, probe: ctypes.CDLL) -> None:
    x = numbers()
    codes = probed(getattr(probe, function), x, FORMATS.index(name))
    assert torch.equal(codes, definition(name, x))
    assert not torch.equal(codes, definition(name, x * (1 + 2.0**-20))), "a difference of 8 ulp is seen"


@pytest.mark.parametrize("name", FORMATS)
def test_core_is_nvidias(name: str, probe: ctypes.CDLL) -> None:
    if nvidia_headers() is None:
        pytest.skip("cuda_fp4.h is neither in a CUDA toolkit nor in the wheel of Triton")
    x = numbers()
    expected, nan = probed(probe.encode_nvidia, x, FORMATS.index(name)), x.isnan()
    codes = probed(probe.encode_scalars, x, FORMATS.index(name))
    assert torch.equal(codes[~nan], expected[~nan])
    if name in DTYPES:
        assert expected[nan].view(DTYPES[name]).isnan().all() and (codes[nan] == 0x7F).all(), "NaN without its sign and payload"
    else:
        assert torch.equal(codes[nan], expected[nan])


@pytest.mark.parametrize("name", FORMATS)
def test_definition_is_that_of_ml_dtypes(name: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    x = numbers()
    x = x[~x.isnan()]
    if name == "e8m0":
        # ml_dtypes rounds to nearest; on powers of two there is nothing to round.
        x = decode_e8m0(torch.arange(255, dtype=torch.uint8))
    if name in DTYPES:
        x = x.clamp(-torch.finfo(DTYPES[name]).max, torch.finfo(DTYPES[name]).max)
    theirs = {"e2m1": "float4_e2m1fn", "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2", "e8m0": "float8_e8m0fnu"}[name]
    expected = torch.from_numpy(x.numpy().astype(getattr(ml_dtypes, theirs)).view("uint8"))
    assert torch.equal(definition(name, x), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_decoding(name: str, probe: ctypes.CDLL) -> None:
    mine = torch.empty(256)
    probe.decode(FORMATS.index(name), ctypes.c_void_p(mine.data_ptr()))
    codes = torch.arange(256, dtype=torch.uint8)
    decoders = {"e2m1": lambda: decode_e2m1(codes & 15), "e8m0": lambda: decode_e8m0(codes)}
    expected = decoders[name]() if name in decoders else codes.view(DTYPES[name]).float()
    assert torch.equal(mine.nan_to_num(7e30), expected.nan_to_num(7e30))
    assert torch.equal(mine.signbit() & ~mine.isnan(), expected.signbit() & ~expected.isnan())
    finite = mine[expected.isfinite()]
    assert torch.equal(definition(name, finite), (codes & 15 if name == "e2m1" else codes)[expected.isfinite()]), "what is exact stays"


def test_e8m0_rounds_up() -> None:
    x = torch.tensor([1.0, 1.0000001, 1.5, 3.0, 2.0**-127, 2.0**-126 * 0.75, 0.0, 3e38, math.inf, math.nan])
    assert encode_e8m0(x).tolist() == [127, 128, 128, 129, 0, 1, 0, 254, 254, 255]
    assert decode_e8m0(torch.tensor([0, 127, 254], dtype=torch.uint8)).tolist() == [2.0**-127, 1.0, 2.0**127]


def test_stochastic_core_is_the_definition(probe: ctypes.CDLL) -> None:
    x = numbers()
    random = torch.randint(0, 256, x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    codes = torch.empty(len(x), dtype=torch.uint8)
    probe.encode_stochastic(
        *(ctypes.c_void_p(t.data_ptr()) for t in (x, random)), ctypes.c_int64(len(x)), ctypes.c_void_p(codes.data_ptr())
    )
    assert torch.equal(codes, encode_e2m1_stochastic(x, random))
    assert not torch.equal(codes, encode_e2m1_stochastic(x, 255 - random))


def test_stochastic_rounding_has_the_expected_value() -> None:
    """Of every random byte: what is between two numbers becomes them in the ratio of the distances, to 1/512 of the spacing."""
    x = torch.linspace(-6, 6, 4001)[:, None]
    values = decode_e2m1(encode_e2m1_stochastic(x.expand(-1, 256), torch.arange(256)))
    spacing = torch.where(x.abs() < 2, 0.5, torch.where(x.abs() < 4, 1.0, 2.0))[:, 0]
    assert ((values.mean(1) - x[:, 0]).abs() <= spacing / 512 * 1.0001).all()
    assert abs(float((values.mean(1) - x[:, 0]).mean())) < 1e-4
    exact = decode_e2m1(torch.arange(16))
    assert torch.equal(
        decode_e2m1(encode_e2m1_stochastic(exact[:, None].expand(-1, 256), torch.arange(256))), exact[:, None].expand(-1, 256)
    )
    assert (decode_e2m1(encode_e2m1(x))[:, 0] - x[:, 0]).abs().max() > 0.5, "to nearest is off by up to half a spacing"


def test_nibbles_lie_low_one_first() -> None:
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert pack_nibbles(codes).tolist() == [[0x21, 0x0F]]
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)
