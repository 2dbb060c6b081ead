"""Norm and quantization in one pass have the bits of one after the other."""

import ctypes
import importlib
import itertools
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels import build, fp8_quantize, native, nvfp4_quantize
from megatron_ext.kernels.norm import rms_norm
from megatron_ext.kernels.norm_quantize import rms_norm_quantize
from megatron_ext.kernels.quantized import FP8Tensor, NVFP4Tensor
from tests.kernels.triton_programs import compiled, run_program


def runs_here(backend: str) -> bool:
    try:
        rms_norm_quantize(torch.ones(1, 1), torch.ones(1), backend=backend)
    except ConfigError:
        return False
    return True


BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(not runs_here(name), reason=f"{name}: this machine cannot run it"))
    for name in ("cpu-portable", "cpu-avx2", "cpu-avx512")
]
AMAX = torch.tensor(5.0)
WAYS = [{}, {"power_of_two": True}, {"format": "nvfp4", "amax": AMAX}]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def one_after_the_other(
    x: Tensor, weight: Tensor, residual: Tensor | None, way: dict, backend: str = "cpu"
) -> tuple[FP8Tensor | NVFP4Tensor, *tuple[Tensor, ...]]:
    result = rms_norm(x, weight, residual=residual, backend=backend)
    y, *sums = (result,) if residual is None else result
    if way.get("format") == "nvfp4":
        return nvfp4_quantize(y, amax=way["amax"]), *sums
    return fp8_quantize(y, scaling="1x128", **way), *sums


def same(mine: FP8Tensor | NVFP4Tensor, expected: FP8Tensor | NVFP4Tensor) -> bool:
    pairs = [(getattr(mine, name), getattr(expected, name)) for name in ("codes", "scales", "amax")]
    equal = all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
        for a, b in pairs
    )
    return type(mine) is type(expected) and mine.shape == expected.shape and mine.block == expected.block and equal


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_are_those_of_one_after_the_other(backend: str, dtype: torch.dtype) -> None:
    for (rows, width), one_gain, with_residual, way in itertools.product(
        ((1, 1), (3, 7), (5, 16), (4, 130), (3, 257), (70, 384), (0, 40)), (False, True), (False, True), WAYS
    ):
        x = random(rows, width + 5, dtype=dtype)[:, 2 : 2 + width] * 3
        weight, residual = random(1 if one_gain else width, seed=1, dtype=dtype), random(rows, width, seed=2, dtype=dtype)
        residual = residual if with_residual else None
        expected, *sums = one_after_the_other(x, weight, residual, way)
        for threads in (1, 3):
            result = rms_norm_quantize(x, weight, residual=residual, backend=backend, threads=threads, **way)
            mine, *total = result if with_residual else (result,)
            assert same(mine, expected) and all(torch.equal(a, b) for a, b in zip(total, sums, strict=True)), (rows, width, way)


def test_all_variants_agree_where_the_cpu_lacks_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them compiled for any CPU: the compiler makes of vectors of 16 floats what there is."""
    library = tmp_path / "norm_quantize.so"
    flags = [flag if flag != "-O3" else "-O0" for flag in build.FLAGS]
    everywhere = ["-Dtarget(x)=unused", "-D__builtin_cpu_supports(x)=1", f"-I{build.SOURCES / 'common'}"]
    source = build.SOURCES / "cpu" / "norm_quantize.cpp"
    subprocess.run([build.find_compiler(), *flags, *everywhere, str(source), "-o", str(library)], check=True)
    cases = [(random(3, 290, dtype=dtype), random(290, seed=1), way) for dtype in (torch.float32, torch.bfloat16) for way in WAYS]
    expected = [one_after_the_other(x, weight, None, way)[0] for x, weight, way in cases]
    monkeypatch.setattr(native, "load_library", lambda stem: ctypes.CDLL(str(library)))
    for name in ("cpu-avx512", "cpu-avx2", "cpu-portable"):
        for (x, weight, way), bits in zip(cases, expected, strict=True):
            assert same(rms_norm_quantize(x, weight, backend=name, **way), bits), (name, x.dtype, way)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_special_values(backend: str, dtype: torch.dtype) -> None:
    """Rows of zeros, NaN and infinity, and values that saturate: their bits too."""
    x, weight = random(6, 150, dtype=dtype), random(150, seed=1, dtype=dtype)
    x[0], x[1, 3], x[2, 5], weight[20:24] = 0, torch.nan, torch.inf, 30000.0
    for way in (*WAYS, {"format": "nvfp4", "amax": torch.tensor(0.0)}, {"format": "nvfp4", "amax": torch.tensor(torch.inf)}):
        expected, *_ = one_after_the_other(x, weight, None, way)
        if backend == "cpu":
            assert same(rms_norm_quantize(x, weight, **way), expected), way
        mine = rms_norm_quantize(x[3:], weight, backend=backend, **way)
        difference = (mine.codes.int() - expected.codes[3:].int()).count_nonzero()
        assert difference <= 3, "statistics of backends differ by a last bit, which moves few codes"


def test_what_the_result_depends_on() -> None:
    x, weight = random(4, 256), random(256, seed=1)
    base = rms_norm_quantize(x, weight)
    for other in (
        rms_norm_quantize(x, weight.flip(0)),
        rms_norm_quantize(x, weight, residual=x.flip(1))[0],
        rms_norm_quantize(x, weight, 10.0),
    ):
        assert not same(other, base)
    low, high = (rms_norm_quantize(x, weight, format="nvfp4", amax=torch.tensor(value)) for value in (1.0, 9.0))
    assert not torch.equal(low.scales.view(torch.uint8), high.scales.view(torch.uint8))


def test_errors_say_what_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, weight = random(3, 8), random(8)
    for arguments, options, message in (
        ((x[None], weight), {}, r"accepted are \[M, K\]"),
        ((x.double(), weight.double()), {}, "torch.float64; accepted are"),
        ((x, weight), {"format": "mxfp8"}, "'mxfp8'; accepted are fp8_blockwise, nvfp4"),
        ((x, weight), {"format": "nvfp4"}, r"amax is None for nvfp4; accepted are \[\]"),
        ((x, weight), {"amax": AMAX}, "None for fp8_blockwise"),
        ((x, weight), {"format": "nvfp4", "amax": AMAX, "power_of_two": True}, "accepted is False"),
        ((x, weight), {"backend": "triton"}, "needs a CUDA device, not cpu"),
        ((x, weight), {"backend": "cuda"}, "accepted are auto, torch, cpu.*triton"),
        ((x, random(8).requires_grad_()), {}, r"no backward.*accepted is torch.no_grad"),
    ):
        with pytest.raises(ConfigError, match=message):
            rms_norm_quantize(*arguments, **options)
    with torch.no_grad():
        assert rms_norm_quantize(x, random(8).requires_grad_()).shape == (3, 8)


def test_compiles_as_one_graph() -> None:
    x, weight = random(5, 300), random(300, seed=1)
    compiled = torch.compile(lambda x: rms_norm_quantize(x, weight).codes, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), rms_norm_quantize(x, weight).codes)


def triton_in_the_interpreter() -> None:
    for (rows, width), dtype, way in itertools.product(((3, 7), (20, 130), (2, 600)), (torch.float32, torch.bfloat16), WAYS):
        x, weight = random(rows, width + 5, dtype=dtype)[:, 2 : 2 + width] * 3, random(width, seed=1, dtype=dtype)
        x[1, 1] = torch.nan if width == 130 else 0
        residual = random(rows, width, seed=2, dtype=dtype) if width != 7 else None
        weight = weight[:1] if width == 600 else weight
        expected, *sums = one_after_the_other(x, weight, residual, way, "triton")
        result = rms_norm_quantize(x, weight, residual=residual, backend="triton", **way)
        mine, *total = result if sums else (result,)
        assert same(mine, expected), (rows, width, dtype, way)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(total, sums, strict=True))


def triton_compiled() -> None:
    """For GPUs that are not here."""
    module = importlib.import_module("megatron_ext.csrc.triton.norm_quantize")
    types = dict.fromkeys(("x", "residual", "total"), "*bf16") | dict.fromkeys(("weight", "amax"), "*fp32") | {"codes": "*u8"}
    types |= dict.fromkeys(("rows", "width", "x_stride", "residual_stride"), "i32") | {"eps": "fp32"}
    constants = {"POWER_OF_TWO": False, "HAS_RESIDUAL": True, "ONE_GAIN": False, "HEIGHT": 2, "WIDTH": 1024, "BY_BITS": False}
    for architecture, (kernel, scales) in itertools.product((80, 90, 100), ((module._fp8_kernel, "*fp32"), (module._nvfp4_kernel, "*u8"))):
        built = compiled(kernel, architecture, types | {"scales": scales}, constants, num_warps=4)
        assert ".ftz" not in built["ptx"] and "fma.rn.f32" not in built["ptx"] and built["cubin"], (architecture, kernel)


@pytest.mark.parametrize(
    ("program", "interpret"), [(triton_in_the_interpreter, True), (triton_compiled, False)], ids=lambda x: getattr(x, "__name__", x)
)
def test_triton_without_a_gpu(program: Callable[[], None], interpret: bool) -> None:
    run_program(program, interpret=interpret)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="triton: there is no GPU")
def test_triton_on_a_gpu() -> None:
    for (rows, width), dtype, way in itertools.product(((3, 7), (200, 1100), (70, 5120)), (torch.float32, torch.bfloat16), WAYS):
        x, weight = random(rows, width, dtype=dtype).cuda() * 3, random(width, seed=1, dtype=dtype).cuda()
        way = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in way.items()}
        expected, *_ = one_after_the_other(x, weight, None, way, "triton")
        assert same(rms_norm_quantize(x, weight, backend="triton", **way), expected), (rows, width, dtype, way)
