"""FP8 products: exact on lattices, PyTorch's own scaled_mm on the CPU, and the error of float32 sums on other data."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels import fp8_gemm
from megatron_ext.kernels.fp8_gemm import select_backend
from megatron_ext.kernels.fp8_quantize import BLOCKS, fp8_quantize
from megatron_ext.kernels.quantized import FP8Tensor
from megatron_ext.kernels.scaled_mm import fp8_obstacle, fp8_scaled_mm, fp8_scaling

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SHAPES = [(1, 1, 1), (5, 7, 70), (16, 16, 16), (33, 130, 257), (140, 3, 128), (2, 150, 300)]
RECIPES = {
    "tensorwise": ("tensor", "tensor"),
    "rowwise": ("row", "row"),
    "tensorwise with rowwise": ("tensor", "row"),
    "1x128 with 128x128": ((1, 128), (128, 128)),
    "1x128 with 1x128": ((1, 128), (1, 128)),
    "128x128 with 1x128": ((128, 128), (1, 128)),
    "mxfp8": ((1, 32), (1, 32)),
}
Block = str | tuple[int, int]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lattices(rows: int, depth: int, seed: int) -> list[Tensor]:
    """Ternary numbers, integers up to 8, and the numbers of E2M1: whatever the tensor cores' sums, these are exact."""
    integers = torch.randint(-8, 9, (rows, depth), generator=generator(seed)).float()
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6])
    return [integers.sign(), integers, grid[torch.randint(0, 15, (rows, depth), generator=generator(seed))]]


def fp8(x: Tensor, block: Block, dtype: torch.dtype = E4M3, seed: int | None = None) -> FP8Tensor:
    """By PyTorch's casts. With ``seed``: ``x`` are the numbers of the codes, and the scales random powers of two; a tenth of them zero."""
    rows, columns = x.shape
    height, width = {"tensor": (rows, columns), "row": (1, columns)}.get(block, block)
    blocks = torch.nn.functional.pad(x, (0, -columns % width, 0, -rows % height)).unflatten(1, (-1, width)).unflatten(0, (-1, height))
    amax = blocks.abs().amax((1, 3))
    largest = torch.finfo(dtype).max
    power = width == 32 and block == (1, 32)
    if seed is not None:
        # Much between rows and little along them, so that sums need no more than 24 bits.
        between, along = (
            torch.randint(-4, 5, amax.shape[:1], generator=generator(seed)),
            torch.randint(-1, 2, amax.shape, generator=generator(seed)),
        )
        scales = torch.exp2((between[:, None] + along).float())
        scales = scales if power else scales.masked_fill(torch.rand(amax.shape, generator=generator(seed)) < 0.1, 0.0)
    else:
        scales = (amax / largest).clamp(min=2.0**-40)
        scales = torch.exp2(scales.log2().ceil()) if power else scales
    divisors = torch.ones_like(scales) if seed is not None else scales
    codes = (blocks / divisors[:, None, :, None]).clamp(-largest, largest).to(dtype).view(torch.uint8)
    codes = codes.flatten(0, 1).flatten(1)[:rows, :columns].contiguous()
    return FP8Tensor(codes, scales.to(torch.float8_e8m0fnu) if power else scales, amax, (height, width), dtype)


def values(x: FP8Tensor) -> Tensor:
    """Codes times scales in float64."""
    scales = x.scales.float().double().repeat_interleave(x.block[0], 0).repeat_interleave(x.block[1], 1)
    return x.codes.view(x.dtype).float().double() * scales[: x.shape[0], : x.shape[1]]


def bound(a: FP8Tensor, b: FP8Tensor) -> Tensor:
    """Of the error of float32 sums, in any order, with a few more roundings for scales."""
    return (a.shape[1] + 8) * 2.0**-24 * (values(a).abs() @ values(b).abs().T) + 2.0**-140


def pairs(recipe: str, shape: Sequence[int], **ways: object) -> list[tuple[FP8Tensor, FP8Tensor]]:
    """Of all lattices, with scales that are powers of two."""
    rows, columns, depth = shape
    left, right = RECIPES[recipe]
    xs, ws = lattices(rows, depth, 1), lattices(columns, depth, 2)
    return [(fp8(x, left, seed=3, **ways), fp8(w, right, seed=4, **ways)) for x, w in zip(xs, ws, strict=True)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_lattices_are_exact(recipe: str) -> None:
    for shape in SHAPES:
        for a, b in pairs(recipe, shape):
            exact = values(a) @ values(b).T
            for out_dtype in (torch.float32, torch.bfloat16):
                for backend in ("torch", "cpu"):
                    mine = fp8_gemm(a, b, out_dtype=out_dtype, backend=backend)
                    assert mine.dtype == out_dtype and torch.equal(mine, exact.float().to(out_dtype)), (shape, backend)


@pytest.mark.parametrize("recipe", RECIPES)
def test_error_is_that_of_float32(recipe: str) -> None:
    left, right = RECIPES[recipe]
    for rows, columns, depth in SHAPES:
        x = torch.randn(rows, depth, generator=generator(0)) * torch.logspace(-2, 2, rows)[:, None]
        w = torch.randn(columns, depth, generator=generator(1))
        x[2:4], w[:, 5:6] = 0, 0
        a, b = fp8(x, left), fp8(w, right)
        mine, compiled = (fp8_gemm(a, b, out_dtype=torch.float32, backend=name).double() for name in ("torch", "cpu"))
        assert torch.equal(mine, compiled)
        exact = values(a) @ values(b).T
        assert ((mine - exact).abs() <= bound(a, b)).all(), (rows, columns, depth)
        assert float((mine - (x @ w.T)).norm()) < 0.15 * float((x @ w.T).norm()) + 1e-9, "it is a product of these matrices"
        swapped = fp8(x.flip(1), left)
        assert depth == 1 or ((fp8_gemm(swapped, b, out_dtype=torch.float32).double() - exact).abs() > bound(a, b)).any()


def test_scales_of_one_sum_come_after_it() -> None:
    """Sums of lattices are exact, so that the roundings of the scales are all there is: that of a, then that of b."""
    x, w = lattices(20, 300, 1)[1], lattices(30, 300, 2)[1]
    ones = replace(fp8(x, "row"), codes=x.to(E4M3).view(torch.uint8)), replace(fp8(w, "row"), codes=w.to(E4M3).view(torch.uint8))
    a, b = (replace(each, scales=torch.rand(each.scales.shape, generator=generator(5)) + 0.1) for each in ones)
    expected = (x.double() @ w.double().T).float() * a.scales * b.scales.T
    assert torch.equal(fp8_gemm(a, b, out_dtype=torch.float32, backend="torch"), expected)
    folded = (x * a.scales) @ (w * b.scales).T
    assert not torch.equal(folded, expected), "scales in the operands would round each value"


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "tensorwise with rowwise"])
def test_pytorchs_own_product_on_the_cpu(recipe: str) -> None:
    """``native`` is code none of us wrote, except for padding and layouts."""
    for shape in SHAPES:
        for a, b in pairs(recipe, shape):
            for out_dtype in (torch.float32, torch.bfloat16):
                mine, theirs = (fp8_gemm(a, b, out_dtype=out_dtype, backend=name) for name in ("torch", "native"))
                assert theirs.dtype == out_dtype and torch.equal(mine, theirs), shape
        left, right = RECIPES[recipe]
        x, w = (torch.randn(rows, shape[2], generator=generator(rows)) for rows in shape[:2])
        for dtypes in ((E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2), (E5M2, E5M2)):
            a, b = fp8(x, left, dtypes[0]), fp8(w, right, dtypes[1])
            mine, theirs = (fp8_gemm(a, b, out_dtype=torch.float32, backend=name).double() for name in ("torch", "native"))
            assert ((mine - theirs).abs() <= 2 * bound(a, b)).all(), (shape, dtypes)
    assert not torch.equal(mine, fp8_gemm(a, replace(b, dtype=E4M3), out_dtype=torch.float32).double()), "the format counts"


def test_all_codes_are_decoded() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    one = torch.ones(1, 1)
    for dtype in (E4M3, E5M2):
        a = FP8Tensor(every[:, None].contiguous(), one, one, (256, 1), dtype)
        b = FP8Tensor(torch.ones(1, 1).to(dtype).view(torch.uint8), one, one, (1, 1), dtype)
        mine = fp8_gemm(a, b, out_dtype=torch.float32)[:, 0]
        torch.testing.assert_close(mine, every.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scaling", BLOCKS)
def test_products_of_what_fp8_quantize_returns(scaling: str) -> None:
    x, w = torch.randn(70, 300, generator=generator(0)), torch.randn(150, 300, generator=generator(1))
    a, b = fp8_quantize(x, scaling=scaling), fp8_quantize(w, scaling="128x128" if scaling == "1x128" else scaling)
    mine = fp8_gemm(a, b, out_dtype=torch.float32).double()
    assert ((mine - values(a) @ values(b).T).abs() <= bound(a, b)).all()
    assert float((mine - x @ w.T).norm() / (x @ w.T).norm()) < 0.06


def test_what_is_wrong_is_seen() -> None:
    a, b = pairs("1x128 with 128x128", (140, 300, 384))[1]
    right = values(a) @ values(b).T
    for mistake, changed in {
        "scales of the next block": replace(a, scales=a.scales.roll(1, 1)),
        "scales of the next row": replace(a, scales=a.scales.roll(1, 0)),
        "codes of the next column": replace(a, codes=a.codes.roll(1, 1)),
    }.items():
        assert torch.equal(fp8_gemm(changed, b, out_dtype=torch.float32).double(), values(changed) @ values(b).T), mistake
        assert not torch.equal(fp8_gemm(changed, b, out_dtype=torch.float32).double(), right), mistake
    square = replace(b, scales=b.scales.T.contiguous())
    assert not torch.equal(fp8_gemm(a, square, out_dtype=torch.float32).double(), right), "scales transposed"


def test_empty_matrices() -> None:
    one = torch.ones(1, 1)
    for rows, columns, depth in ((0, 5, 40), (3, 0, 40), (3, 5, 0)):
        a, b = (FP8Tensor(torch.zeros(size, depth, dtype=torch.uint8), one, one, (size, depth)) for size in (rows, columns))
        assert torch.equal(fp8_gemm(a, b, out_dtype=torch.float32), torch.zeros(rows, columns))


def scaled_mm_read_back(a: Tensor, b: Tensor, *arguments: object, output_dtype: torch.dtype, use_fast_accum: bool) -> Tensor:
    """What PyTorch's scaled_mm computes, with its checks of shapes and strides on GPUs (ScaledBlas.cpp), read back from its arguments."""
    a_scales, a_recipe, b_scales, b_recipe, *swizzles = arguments
    assert a.is_contiguous() and b.T.is_contiguous() and a.shape[1] % 16 == 0 and b.shape[1] % 16 == 0
    sides = []
    for codes, scales, recipe, side in ((a, a_scales, a_recipe.name, 0), (b.T, b_scales, b_recipe.name, 1)):
        rows, columns = codes.shape
        blocks = -(-columns // 128)
        if recipe == "BlockWise1x128":
            assert scales.shape == (rows, blocks) and scales.stride(0) == 1 and (blocks == 1 or scales.stride(1) == rows) and rows % 4 == 0
            expanded = scales.repeat_interleave(128, 1)
        elif recipe == "BlockWise128x128":
            filled = -(-blocks // 4) * 4
            assert scales.shape == (filled, -(-rows // 128)) and scales.stride(0) == 1
            assert scales.shape[1] == 1 or scales.stride(1) == filled
            expanded = scales.T.repeat_interleave(128, 0).repeat_interleave(128, 1)
        elif recipe == "BlockWise1x32":
            tiles = (-(-rows // 128), -(-columns // 128))
            assert scales.numel() == tiles[0] * tiles[1] * 512 and scales.is_contiguous() and scales.dtype == torch.float8_e8m0fnu
            assert all(swizzle.name == "SWIZZLE_32_4_4" for swizzle in swizzles)
            plain = scales.float().view(*tiles, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(tiles[0] * 128, tiles[1] * 4)
            expanded = plain.repeat_interleave(32, 1)
        elif recipe == "RowWise":
            assert scales.shape == ((rows, 1), (1, rows))[side] and scales.stride(1) == 1
            expanded = scales.reshape(rows, 1)
        else:
            assert scales.numel() == 1
            expanded = scales.reshape(1, 1)
        sides.append(codes.float().double() * expanded[:rows, :columns].double())
    return (sides[0] @ sides[1].T).to(output_dtype)


@pytest.mark.parametrize("recipe", RECIPES)
def test_arguments_of_scaled_mm_stand_for_the_same_product(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_mm_read_back)
    for shape in ((33, 130, 257), (140, 3, 160), (6, 300, 640)):
        for a, b in pairs(recipe, shape):
            assert torch.equal(fp8_scaled_mm(a, b, torch.float32, False).double(), values(a) @ values(b).T), shape


def test_backend_is_chosen_by_visible_rules() -> None:
    a, b = pairs("tensorwise", (4, 6, 40))[0]
    tile, square = pairs("1x128 with 128x128", (4, 6, 300))[0]
    assert select_backend("auto", a, b) == ("cpu", "auto: emulated on cpu")
    assert select_backend("torch", a, b) == ("torch", "as asked for")
    assert select_backend("native", a, b) == ("native", "as asked for")
    with pytest.raises(
        ConfigError, match="'native', which is PyTorch's scaled_mm, which has, on the CPU, .* none for blocks; able to run here: torch, cpu"
    ):
        fp8_gemm(tile, square, backend="native")
    with pytest.raises(ConfigError, match="'cuda', which needs tensors on cuda, not on cpu; able to run here: torch, cpu"):
        fp8_gemm(a, b, backend="cuda")


def test_what_gpus_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    runs = {
        (8, 0): set(),
        (8, 9): {"tensorwise", "rowwise", "tensorwise with rowwise"},
        (9, 0): set(RECIPES) - {"mxfp8"},
        (10, 0): {"tensorwise", "rowwise", "tensorwise with rowwise", "mxfp8"},
    }
    for capability, able in runs.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        for recipe in RECIPES:
            a, b = pairs(recipe, (200, 300, 400))[0]
            assert (fp8_obstacle(a, b, device) is None) == (recipe in able), (capability, recipe)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    tile, square = pairs("1x128 with 128x128", (200, 300, 400))[0]
    a, b = pairs("tensorwise", (4, 6, 40))[0]
    assert "one side of 1 x 128" in fp8_obstacle(square, square, device)
    assert "float8_e4m3fn" in fp8_obstacle(replace(a, dtype=E5M2), replace(b, dtype=E5M2), device)
    assert fp8_obstacle(replace(a, dtype=E5M2), b, device) is None
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "CUDA 12.9" in fp8_obstacle(tile, square, device)
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", lambda a, b: None)
    assert "is not in torch" in fp8_obstacle(a, b, device)
    assert [fp8_scaling(x) for x in (tile, square, a)] == ["BlockWise1x128", "BlockWise128x128", "TensorWise"]


def test_errors_say_what_does_not_fit() -> None:
    a, b = pairs("tensorwise", (4, 6, 300))[0]
    tile, square = pairs("1x128 with 128x128", (4, 6, 300))[0]
    micro = pairs("mxfp8", (4, 6, 300))[0][0]
    for arguments, options, message in (
        ((a, replace(b, codes=b.codes[:, 1:], block=(6, 299))), {}, "K and device have to agree"),
        ((a, square), {}, "columns of a block and types have to agree"),
        ((tile, micro), {}, "columns of a block and types have to agree"),
        ((replace(tile, scales=tile.scales[:, 1:]), square), {}, r"scales \[4, 2\]"),
        ((replace(a, dtype=torch.int8), b), {}, "torch.int8"),
        ((a, b), {"out_dtype": torch.float16}, "torch.float32, torch.bfloat16"),
        ((a, b), {"backend": "cutlass"}, "auto, torch, cpu, cuda, native"),
    ):
        with pytest.raises(ConfigError, match=message):
            fp8_gemm(*arguments, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuda: there is no GPU")
@pytest.mark.parametrize("recipe", RECIPES)
def test_lattices_are_exact_on_a_gpu(recipe: str) -> None:
    """Emulated, and natively where the GPU has the format: no emulator of its tensor cores is needed."""
    for shape in SHAPES:
        for pair in pairs(recipe, shape):
            a, b = (replace(x, codes=x.codes.cuda(), scales=x.scales.cuda(), amax=x.amax.cuda()) for x in pair)
            exact = (values(pair[0]) @ values(pair[1]).T).float()
            for backend in ("torch", "cuda", *(() if fp8_obstacle(a, b) else ("native",))):
                assert torch.equal(fp8_gemm(a, b, out_dtype=torch.float32, backend=backend).cpu(), exact), (shape, backend)
