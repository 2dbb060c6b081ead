"""NVFP4 products have the bits of float64 where sums are exact, on every backend, and the error of float32 sums where they are not."""

import importlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels import nvfp4_dequantize, nvfp4_gemm, nvfp4_quantize
from megatron_ext.kernels.nvfp4_gemm import FEW_ROWS, select_backend
from megatron_ext.kernels.quantized import NVFP4Tensor
from megatron_ext.kernels.scaled_mm import nvfp4_scaled_mm, swizzled
from tests.kernels.triton_programs import compiled, run_program

SIGNS = torch.tensor([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1], dtype=torch.float32)
SHAPES = [(1, 1, 1), (5, 7, 70), (16, 16, 16), (33, 130, 257), (130, 3, 128), (2, 40, 17)]
BACKENDS = [
    "torch",
    "cpu",
    *(
        pytest.param(name, marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=f"{name}: there is no GPU")])
        for name in ("cuda", "triton")
    ),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def numbers(x: NVFP4Tensor) -> Tensor:
    """Codes times scales of blocks in float64, [M, K'], read by ml_dtypes and a table."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    scales = torch.from_numpy(x.row_scales().view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype("float64"))
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    codes = torch.stack([x.codes & 15, x.codes >> 4], -1).flatten(1).long()
    return torch.where(codes < 8, 1.0, -1.0) * table[codes & 7] * scales.repeat_interleave(16, 1)


def expected(a: NVFP4Tensor, b: NVFP4Tensor, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """Sums in float64; then what every backend does after its sums: round to float32, times alpha, round once."""
    alpha = (a.amax / (6.0 * 448.0)) * (b.amax / (6.0 * 448.0))
    return ((numbers(a) @ numbers(b).T).float() * alpha).to(out_dtype)


def certain(a: NVFP4Tensor, b: NVFP4Tensor) -> Tensor:
    """Which sums are exact in float32 in whatever order: their terms are multiples of a unit and never come to 2^24 of it."""
    left, right = numbers(a), numbers(b)
    units = []
    for values in (left, right):
        integers = (values * 2**10).long()
        units.append((integers & -integers).masked_fill(integers == 0, 2**40).amin(1).double() / 2**10)
    return left.abs() @ right.abs().T <= 2.0**24 * units[0][:, None] * units[1]


def check(mine: Tensor, a: NVFP4Tensor, b: NVFP4Tensor) -> None:
    """Equal bits where that is certain, which is nearly everywhere."""
    right, exact = expected(a, b, mine.dtype), certain(a, b)
    assert exact.double().mean() > 0.9 and torch.equal(mine[exact], right[exact]), (a.shape, b.shape, a.block, a.signs)
    torch.testing.assert_close(mine, right, rtol=1e-2 if mine.dtype == torch.bfloat16 else 1e-5, atol=0)


def on(x: NVFP4Tensor, backend: str) -> NVFP4Tensor:
    if backend in ("torch", "cpu") or not torch.cuda.is_available():
        return x
    signs = None if x.signs is None else x.signs.cuda()
    return replace(x, codes=x.codes.cuda(), scales=x.scales.cuda(), amax=x.amax.cuda(), signs=signs)


def product(a: NVFP4Tensor, b: NVFP4Tensor, backend: str, out_dtype: torch.dtype = torch.float32) -> Tensor:
    return nvfp4_gemm(on(a, backend), on(b, backend), out_dtype=out_dtype, backend=backend).cpu()


def pair(rows: int, columns: int, depth: int, **ways: object) -> tuple[NVFP4Tensor, NVFP4Tensor]:
    """Rows of scales from 1e-3 to 1e3, with rows, columns and blocks of zeros."""
    a, b = random(rows, depth, seed=1) * torch.logspace(-3, 3, rows)[:, None], random(columns, depth, seed=2)
    a[3:5], b[:, 7:8], b[16:32, 16:48] = 0, 0, 0
    return nvfp4_quantize(a, **ways), nvfp4_quantize(b, **ways)


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_have_the_bits_of_float64(backend: str) -> None:
    for shape in SHAPES:
        for ways in ({}, {"block": (16, 16)}, {"signs": SIGNS}, {"rounding": "stochastic", "seed": 1}):
            a, b = pair(*shape, **ways)
            for out_dtype in (torch.float32, torch.bfloat16):
                mine = product(a, b, backend, out_dtype)
                assert mine.dtype == out_dtype
                check(mine, a, b)
    rows, squares = pair(20, 40, 48)[0], pair(20, 40, 48, block=(16, 16))[1]
    check(product(rows, squares, backend), rows, squares)


@pytest.mark.parametrize("backend", BACKENDS)
def test_real_data_is_exact_at_training_depth(backend: str) -> None:
    """Before alpha: with tensor scales of 1 the result is the sum. Gaussian, scaled by rows, and Student's t with 3 degrees of freedom."""
    gaussian, other = random(40, 4096), random(70, 4096, seed=1)
    student = gaussian / (random(3, 40, 4096, seed=3).square().mean(0)).sqrt()
    for x in (gaussian, gaussian * torch.logspace(-2, 2, 40)[:, None], student):
        a, b = (replace(nvfp4_quantize(each), amax=torch.tensor(2688.0)) for each in (x, other))
        assert torch.equal(product(a, b, backend).double(), numbers(a) @ numbers(b).T)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_over_many_octaves_have_the_error_of_float32(backend: str) -> None:
    """Channels that differ by 2^12 make scales of a row differ so much that 24 bits do not hold the sums."""
    channels = torch.where(torch.arange(8192) % 512 < 256, 1.0, 2.0**-12)
    a, b = (replace(nvfp4_quantize(random(30, 8192, seed=seed) * channels), amax=torch.tensor(2688.0)) for seed in (0, 1))
    exact, mine = numbers(a) @ numbers(b).T, product(a, b, backend).double()
    error, bound = (mine - exact).abs(), 8192 * 2.0**-24 * (numbers(a).abs() @ numbers(b).abs().T)
    assert (error > 0).any(), "not exact, so that the test above says something"
    assert (error <= bound).all()
    assert float((error / bound).max()) < 0.05, "sums are float32, not bfloat16, whose error would be 2^16 times as large"


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_of_both_sides_cancel(backend: str) -> None:
    x, w = random(20, 70), random(30, 70, seed=1)
    a, b = (nvfp4_quantize(each, signs=SIGNS) for each in (x, w))
    back = nvfp4_dequantize(a, torch.float32).double() @ nvfp4_dequantize(b, torch.float32).double().T
    mine = product(a, b, backend).double()
    # K' = 80: what 10 zeros became counts in the product, and is cut off when the transform is undone.
    assert float((mine - back).norm() / back.norm()) < 0.05
    whole = [nvfp4_quantize(random(20, 80, seed=seed), signs=SIGNS) for seed in (2, 3)]
    back = nvfp4_dequantize(whole[0], torch.float32).double() @ nvfp4_dequantize(whole[1], torch.float32).double().T
    torch.testing.assert_close(product(*whole, backend).double(), back, rtol=1e-5, atol=1e-4)
    assert float((mine - (x @ w.T)).norm() / (x @ w.T).norm()) < 0.25, "it is a product of 4-bit numbers"
    for other in (nvfp4_quantize(w), nvfp4_quantize(w, signs=-SIGNS)):
        with pytest.raises(ConfigError, match="same signs, or neither"):
            nvfp4_gemm(a, other)
    assert torch.equal(nvfp4_gemm(a, replace(b, signs=SIGNS.clone())), nvfp4_gemm(a, b))


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_infinities_and_empty_matrices(backend: str) -> None:
    zeros, b = nvfp4_quantize(torch.zeros(3, 40)), nvfp4_quantize(random(5, 40))
    assert torch.equal(product(zeros, b, backend), torch.zeros(3, 5))
    infinite = random(3, 40)
    infinite[1, 1] = torch.inf
    assert not product(nvfp4_quantize(infinite), b, backend).isfinite().any()
    for shape in ((0, 5, 40), (3, 0, 40), (3, 5, 0)):
        a, b = (nvfp4_quantize(torch.zeros(rows, shape[2])) for rows in shape[:2])
        assert torch.equal(product(a, b, backend), torch.zeros(shape[:2]))


def test_what_is_wrong_is_seen() -> None:
    """Each of these is a mistake that the comparison above has to find."""
    a, b = pair(33, 48, 64, block=(16, 16))
    right = expected(a, b)
    raw = b.scales.view(torch.uint8)
    wrong = {
        "halves of bytes": replace(a, codes=a.codes >> 4 | a.codes << 4),
        "scales of the next block": replace(a, scales=a.scales.view(torch.uint8).roll(1, 1).view(torch.float8_e4m3fn)),
        "scales of the next row of blocks": replace(a, scales=a.scales.view(torch.uint8).roll(1, 0).view(torch.float8_e4m3fn)),
        "no tensor scale": replace(a, amax=torch.tensor(2688.0)),
        "signs of codes": replace(a, codes=a.codes & 0x77),
    }
    for mistake, changed in wrong.items():
        assert torch.equal(nvfp4_gemm(changed, b, out_dtype=torch.float32), expected(changed, b)), mistake
        assert not torch.equal(nvfp4_gemm(changed, b, out_dtype=torch.float32), right), mistake
    transposed = replace(b, scales=raw[:, :3].T.contiguous().repeat(1, 2)[:, :4].view(torch.float8_e4m3fn))
    assert not torch.equal(nvfp4_gemm(a, transposed, out_dtype=torch.float32), right), "scales of columns"


def test_alpha_comes_after_the_sum() -> None:
    """Scales folded into the operands round every value, which the bits show."""
    a, b = pair(20, 30, 256)
    early = nvfp4_dequantize(a, torch.float32) @ nvfp4_dequantize(b, torch.float32).T
    late = expected(a, b)
    assert not torch.equal(early, late) and float((early - late).norm() / late.norm()) < 1e-6


def test_autocast_changes_nothing() -> None:
    a, b = pair(20, 30, 256)
    with torch.autocast("cpu", torch.bfloat16):
        assert (random(2, 2) @ random(2, 2)).dtype == torch.bfloat16
        check(nvfp4_gemm(a, b, out_dtype=torch.float32), a, b)


def test_scales_are_swizzled_as_blackwell_reads_them() -> None:
    scales = torch.randint(0, 127, (200, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mine = swizzled(scales.view(torch.float8_e4m3fn))
    tile_columns = 3
    place = torch.zeros(256 * 12, dtype=torch.uint8)
    for row in range(200):
        for column in range(9):
            tile = row // 128 * tile_columns + column // 4
            place[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4] = scales[row, column]
    assert mine.dtype == torch.float8_e4m3fn and torch.equal(mine.view(torch.uint8), place)


def scaled_mm_read_back(
    a: Tensor, b: Tensor, a_scales: list[Tensor], recipe: list, b_scales: list[Tensor], *rest: object, **kw: object
) -> Tensor:
    """What PyTorch's scaled_mm computes of two-level NVFP4, as its documentation and checks say, read back from its arguments."""
    scaling, swizzle = torch.nn.functional.ScalingType, torch.nn.functional.SwizzleType
    assert recipe == [scaling.BlockWise1x16, scaling.TensorWise] == rest[0]
    assert rest[1] == [swizzle.SWIZZLE_32_4_4, swizzle.NO_SWIZZLE] == rest[2]
    assert a.dtype == b.dtype == torch.float4_e2m1fn_x2 and a.is_contiguous() and b.T.is_contiguous()
    assert a.shape[1] % 16 == 0 and a.shape[0] % 128 == 0 and b.shape[1] % 16 == 0
    values = []
    for codes, (scales, tensor_scale) in ((a, a_scales), (b.T, b_scales)):
        rows, blocks = codes.shape[0], codes.shape[1] // 8
        tiles = (-(-rows // 128), -(-blocks // 4))
        assert scales.numel() == tiles[0] * tiles[1] * 512 and scales.is_contiguous() and scales.dtype == torch.float8_e4m3fn
        assert tensor_scale.numel() == 1 and tensor_scale.dtype == torch.float32
        plain = scales.view(torch.uint8).view(*tiles, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(tiles[0] * 128, tiles[1] * 4)[:rows, :blocks]
        bytes_ = codes.contiguous().view(torch.uint8)
        values.append(NVFP4Tensor(bytes_, plain.contiguous().view(torch.float8_e4m3fn), tensor_scale * 2688, (rows, 16 * blocks)))
    return expected(values[0], values[1], kw["output_dtype"])


def test_arguments_of_scaled_mm_stand_for_the_same_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_mm_read_back)
    for shape in SHAPES:
        for ways in ({}, {"block": (16, 16)}):
            a, b = pair(*shape, **ways)
            a, b = replace(a, amax=torch.tensor(672.0)), replace(b, amax=torch.tensor(5376.0))
            mine = nvfp4_scaled_mm(a, b, (a.amax / 2688, b.amax / 2688), torch.float32)
            assert torch.equal(mine, expected(a, b)), (shape, ways)


def test_backend_is_chosen_by_visible_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = importlib.import_module("megatron_ext.kernels.nvfp4_gemm")
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernel, "_importable", lambda package: True)
    assert select_backend("auto", cpu, 5, 5) == ("cpu", "auto: emulated on cpu")
    assert select_backend("torch", cpu, 5, 5) == ("torch", "as asked for")
    assert select_backend("auto", torch.device("meta"), 5, 5)[0] == "torch"
    for name, message in (
        ("native", r"'native', which is PyTorch's scaled_mm, .*10.0.*able to run here: torch, cpu$"),
        ("triton", "CUDA"),
        ("cuda", "on cpu"),
    ):
        with pytest.raises(ConfigError, match=message):
            select_backend(name, cpu, 5, 5)
    for capability, sizes, chosen in (
        ((9, 0), (4096, 4096), "cuda"),
        ((9, 0), (FEW_ROWS, 4096), "triton"),
        ((8, 0), (4096, FEW_ROWS), "triton"),
        ((10, 0), (4096, 4096), "native"),
        ((12, 0), (1, 4096), "native"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert select_backend("auto", cuda, *sizes)[0] == chosen, (capability, sizes)
        if capability < (10, 0):
            with pytest.raises(ConfigError, match=r"10.0 or more, not \d.0; able to run here: torch, cuda, triton$"):
                select_backend("native", cuda, *sizes)


def test_errors_say_what_is_accepted() -> None:
    a, b = pair(3, 4, 40)
    for arguments, options, message in (
        ((a, nvfp4_quantize(random(4, 56))), {}, "K and device have to agree"),
        ((a, b), {"out_dtype": torch.float16}, "torch.float32, torch.bfloat16"),
        ((a, b), {"backend": "cutlass"}, "auto, torch, cpu"),
    ):
        with pytest.raises(ConfigError, match=message):
            nvfp4_gemm(*arguments, **options)


def triton_in_the_interpreter() -> None:
    """Borders inside tiles, both kinds of blocks, both ways to be long."""
    for shape, ways in (((1, 1, 1), {}), ((5, 70, 200), {}), ((140, 20, 144), {"block": (16, 16)}), ((130, 133, 23), {})):
        a, b = pair(*shape, **ways)
        check(nvfp4_gemm(a, b, out_dtype=torch.bfloat16 if shape[0] == 5 else torch.float32, backend="triton"), a, b)
    a, b = pair(20, 30, 64)
    every = torch.arange(256, dtype=torch.uint8)
    a = replace(
        a, codes=every.roll(1).repeat(20)[: 20 * 32].view(20, 32), scales=(every[: 20 * 4] % 127).view(20, 4).view(torch.float8_e4m3fn)
    )
    assert torch.equal(nvfp4_gemm(a, b, out_dtype=torch.float32, backend="triton"), expected(a, b)), "all codes"


def triton_compiled() -> None:
    """For GPUs that are not here: tensor cores of each generation, and subnormals, which carry the smallest numbers, are kept."""
    tl = importlib.import_module("triton.language")
    kernel = importlib.import_module("megatron_ext.csrc.triton.nvfp4_gemm")._product_kernel
    pointers = {name: "*u8" for name in ("a_codes", "a_scales", "b_codes", "b_scales")} | {"alpha": "*fp32", "out": "*bf16"}
    constants = {"A_SCALE_ROWS": 1, "B_SCALE_ROWS": 16, "TILE_ROWS": 64, "TILE_COLUMNS": 32, "BYTES": 32, "OPERAND": tl.bfloat16}
    types = pointers | dict.fromkeys(("rows", "columns", "width"), "i32")
    for architecture, instruction in ((80, "mma.sync"), (90, "wgmma.mma_async"), (100, "tcgen05.mma")):
        built = compiled(kernel, architecture, types, constants)
        assert instruction in built["ptx"] and ".ftz" not in built["ptx"] and built["cubin"], architecture


@pytest.mark.parametrize(
    ("program", "interpret"), [(triton_in_the_interpreter, True), (triton_compiled, False)], ids=lambda x: getattr(x, "__name__", x)
)
def test_triton_without_a_gpu(program: Callable[[], None], interpret: bool) -> None:
    run_program(program, interpret=interpret)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="native: there is no GPU")
def test_native_on_a_gpu() -> None:
    if torch.cuda.get_device_capability() < (10, 0):
        pytest.skip("native: needs compute capability 10.0")
    for shape in SHAPES:
        a, b = pair(*shape)
        torch.testing.assert_close(product(a, b, "native"), expected(a, b), rtol=1e-5, atol=1e-6)
