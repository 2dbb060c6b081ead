"""What the CUDA kernels compute, shown without a GPU: g++ compiles them with emulated_cuda/cuda_runtime.h, and their bits are compared
with the definitions. How fast they are, and what only a GPU does wrong, this does not show."""

import ctypes
import itertools
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_ext.kernels import build, native
from megatron_ext.kernels.amax import amax_both
from megatron_ext.kernels.fp8_quantize import BLOCKS, fp8_dequantize, fp8_quantize, fp8_quantize_both
from megatron_ext.kernels.hadamard import hadamard_transform
from megatron_ext.kernels.mxfp4_quantize import mxfp4_quantize, mxfp4_quantize_both
from megatron_ext.kernels.nvfp4_quantize import nvfp4_dequantize, nvfp4_quantize, nvfp4_quantize_both
from tests.kernels.backends import uneven_matrix
from tests.kernels.test_fp8_quantize import equal as equal_fp8
from tests.kernels.test_mxfp4_quantize import SIGNS as SIGNS_OF_32
from tests.kernels.test_mxfp4_quantize import equal as equal_mxfp4
from tests.kernels.test_nvfp4_quantize import SIGNS
from tests.kernels.test_nvfp4_quantize import equal as equal_nvfp4

STEMS = ("amax", "fp8_quantize", "hadamard", "mxfp4_quantize", "nvfp4_dequantize", "nvfp4_quantize")
SHAPES = [(1, 1), (33, 72), (129, 137), (130, 131)]
DTYPES = (torch.float32, torch.bfloat16)


def include_flags() -> list[str]:
    return [f"-I{build.SOURCES / folder}" for folder in ("common", "cuda")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kernels in one translation unit, which takes a quarter of the time; each has its own namespace."""
    path = tmp_path_factory.mktemp("emulated") / "kernels.cu"
    headers = ("launch.h", "tile.h", "nvfp4_tile.h", "e2m1.h", "fp8.h", "mxfp4.h")
    texts = (f'namespace of_{stem} {{\n#include "{build.SOURCES}/cuda/{stem}.cu"\n}}\n' for stem in STEMS)
    path.write_text("".join(f'#include "{header}"\n' for header in headers) + "".join(texts))
    return path


@pytest.fixture(scope="module")
def library(source: Path) -> ctypes.CDLL:
    """Unoptimized, because that is what takes the time."""
    library, shim = source.with_suffix(".so"), Path(__file__).with_name("emulated_cuda")
    flags = ["-O0", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-fno-gnu-unique", "-Wno-unknown-pragmas", f"-I{shim}"]
    subprocess.run([build.find_compiler(), *flags, *include_flags(), "-x", "c++", str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(params=[0, 1], ids=["forwards", "backwards"])
def called(request: pytest.FixtureRequest, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has kernels of the CPU done by the emulated ones, threads in one order or the other; the functions that were called."""
    names: list[str] = []
    ctypes.c_int.in_dll(library, "emulated_backwards").value = request.param

    def call(stem: str, function: str, backend: str, threads: int, *arguments: object) -> None:
        assert (build.SOURCES / "cuda" / f"{stem}.cu").is_file()
        names.append(function)
        assert getattr(library, function)(*map(native._c_value, arguments), ctypes.c_void_p(None)) == 0

    monkeypatch.setattr(native, "call", call)
    return names


def same_bits(mine: Tensor, expected: Tensor) -> bool:
    integers = torch.int16 if expected.dtype == torch.bfloat16 else torch.int32
    return mine.shape == expected.shape and torch.equal(mine.contiguous().view(integers), expected.contiguous().view(integers))


def test_every_kernel_is_here() -> None:
    assert tuple(sorted(path.stem for path in (build.SOURCES / "cuda").glob("*.cu"))) == STEMS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hadamard(called: list[str], dtype: torch.dtype) -> None:
    for order, rows in ((1, 7), (2, 5), (8, 3), (16, 257), (64, 70), (512, 9), (2048, 3), (12, 5), (40, 3), (448, 10), (8192, 1)):
        x = torch.randn(rows, order, generator=torch.Generator().manual_seed(order)).to(dtype)
        for signs in (None, torch.linspace(-1, 1, order).sign()):
            expected = hadamard_transform(x, order**-0.5, signs, backend="torch")
            assert same_bits(hadamard_transform(x, order**-0.5, signs), expected), order
    unaligned = torch.randn(1025, generator=torch.Generator().manual_seed(1)).to(dtype)[1:]
    assert same_bits(hadamard_transform(unaligned, 0.25, block=64), hadamard_transform(unaligned, 0.25, block=64, backend="torch"))
    assert set(called) == {"hadamard"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nvfp4(called: list[str], dtype: torch.dtype) -> None:
    for shape, stochastic, square in itertools.product(SHAPES, (False, True), (False, True)):
        x = uneven_matrix(*shape, dtype)
        way = {"rounding": "stochastic" if stochastic else "nearest", "seed": 7, "block": (16, 16) if square else (1, 16)}
        signs = None if square else SIGNS
        expected = nvfp4_quantize_both(x, column_signs=signs, offset=(32, 16), **way, backend="torch")
        mine = nvfp4_quantize_both(x, column_signs=signs, offset=(32, 16), **way)
        assert all(equal_nvfp4(a, b) for a, b in zip(mine, expected, strict=True)), (shape, way)
        alone = nvfp4_quantize(x, signs=signs, **way)
        assert equal_nvfp4(alone, nvfp4_quantize(x, signs=signs, **way, backend="torch")), (shape, way)
        back = nvfp4_dequantize(mine[0], dtype)
        assert same_bits(back, nvfp4_dequantize(mine[0], dtype, backend="torch"))
    assert {"amax", "nvfp4_quantize", "nvfp4_dequantize"} <= set(called)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mxfp4(called: list[str], dtype: torch.dtype) -> None:
    for shape, seed, square in itertools.product(SHAPES, (None, 7), (False, True)):
        x = uneven_matrix(*shape, dtype)
        way = {"seed": seed, "square": square, "signs": None if square else SIGNS_OF_32}
        expected = mxfp4_quantize_both(x, **way, column_signs=way["signs"], offset=(32, 64), backend="torch")
        mine = mxfp4_quantize_both(x, **way, column_signs=way["signs"], offset=(32, 64))
        assert all(equal_mxfp4(a, b) for a, b in zip(mine, expected, strict=True)), (shape, way)
        alone = mxfp4_quantize(x, seed=seed, square=square, stream=5)
        assert equal_mxfp4(alone, mxfp4_quantize(x, seed=seed, square=square, stream=5, backend="torch")), (shape, way)
    x[1, 1], x[2, 40] = float("nan"), float("inf")
    assert equal_mxfp4(mxfp4_quantize(x, seed=3), mxfp4_quantize(x, seed=3, backend="torch"))
    assert set(called) == {"mxfp4_quantize"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_amax(called: list[str], dtype: torch.dtype) -> None:
    for shape, signs in itertools.product(SHAPES, (None, SIGNS)):
        x = uneven_matrix(*shape, dtype)
        expected = amax_both(x, row_signs=signs, column_signs=signs, backend="torch")
        assert torch.equal(torch.stack(amax_both(x, row_signs=signs, column_signs=signs)), torch.stack(expected)), shape
    assert set(called) == {"amax"}


def test_fp8(called: list[str]) -> None:
    codes = [torch.float8_e4m3fn, torch.float8_e5m2]
    for number, (shape, scaling) in enumerate(itertools.product([(1, 1), (40, 136), (130, 131)], BLOCKS)):
        dtype = DTYPES[number // 2 % 2]
        x = uneven_matrix(*shape, dtype)
        way = {"scaling": scaling, "dtype": codes[number % 2], "power_of_two": number % 3 == 0}
        for given in ({}, {"amax": torch.tensor(3.5), "column_amax": torch.tensor(2.5)}):
            expected = fp8_quantize_both(x, **way, **given, backend="torch")
            mine = fp8_quantize_both(x, **way, **given)
            assert all(equal_fp8(a, b) for a, b in zip(mine, expected, strict=True)), (shape, way, given)
        assert same_bits(fp8_dequantize(mine[1], dtype), fp8_dequantize(mine[1], dtype, backend="torch"))
    assert equal_fp8(fp8_quantize(x, **way), fp8_quantize(x, **way, backend="torch"))
    assert {"amax", "fp8_amax", "fp8_quantize", "fp8_dequantize"} == set(called)


def test_nvcc_keeps_everything_in_registers(source: Path) -> None:
    """For Hopper; other architectures are those of ``build_all``."""
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is neither on the path nor in /usr/local/cuda")
    flags = [flag for flag in build.CUDA_FLAGS if flag not in ("-shared", "--compiler-options=-fPIC", "-cudart=shared")]
    command = [nvcc, *flags, "-cubin", "-arch=sm_90a", "-Xptxas=-v", *include_flags(), str(source), "-o", str(source.with_suffix(".cubin"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr)
    assert len(frames) == 28 and set(frames) == {("0", "0")}, done.stderr
