"""The recipes written out a second time, in plain PyTorch, from the papers: quantized values in float64, products in float64."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.kernels.philox import block_random
from megatron_ext.precision.options import PrecisionOptions
from megatron_ext.precision.state import PrecisionState

GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
BLOCKS = {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32, "fp8_blockwise": 128}


def to_e2m1(x: Tensor, random: Tensor | None) -> Tensor:
    """The nearest number of the grid, ties to even codes; or the one above with a probability, where random bytes are given."""
    size = x.abs().clamp(max=6.0)
    if random is None:
        distance = (size[..., None] - GRID).abs()
        nearest = distance == distance.amin(-1, keepdim=True)
        rank = nearest.long() * 2 - (torch.arange(8) % 2)
        return GRID[rank.argmax(-1)] * x.sign()
    below = torch.searchsorted(GRID, size, right=True).sub(1).clamp(max=6)
    step = GRID[below + 1] - GRID[below]
    share = (size - GRID[below]) / step
    return torch.where(share * 256 >= 255.5 - random, GRID[below + 1], GRID[below]) * x.sign()


def blocks_of(x: Tensor, width: int, square: bool) -> tuple[Tensor, Tensor]:
    """``x`` with zeros to whole blocks, and the largest magnitude of the block of every value."""
    height = width if square else 1
    x = F.pad(x, (0, -x.shape[1] % width, 0, -x.shape[0] % height))
    largest = F.max_pool2d(x.abs()[None], (height, width))[0] if x.numel() else x[::height, ::width]
    return x, largest.repeat_interleave(height, 0).repeat_interleave(width, 1)


def rotate(x: Tensor, signs: Tensor) -> Tensor:
    """Every n neighbours of a row by the Hadamard matrix of n with signs, in the type of ``x``."""
    order = len(signs)
    matrix = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(order)] for i in range(order)], dtype=torch.float64)
    x64 = F.pad(x, (0, -x.shape[1] % order)).double().unflatten(1, (-1, order))
    return ((x64 * signs.double()) @ matrix / math.sqrt(order)).to(x.dtype).flatten(1)


def quantized_rows(
    x: Tensor,
    format_: str,
    square: bool = False,
    signs: Tensor | None = None,
    random_of: tuple[int, int] | None = None,
    e5m2: bool = False,
    powers: bool = False,
) -> Tensor:
    """What the rows of ``x`` are after quantization, float64 [M, K'].

    ``random_of``: seed and stream of the random bytes that decide the rounding, one for each value in each block of 16.
    """
    if signs is not None:
        x = rotate(x, signs)
    rows = len(x)
    x = x.float()
    if not x.numel():
        return x.double()
    if format_ == "fp8_tensorwise":
        return to_fp8(x, x.abs().amax().expand(x.shape), e5m2, powers)
    if format_ == "fp8_rowwise":
        return to_fp8(x, x.abs().amax(1, keepdim=True).expand(x.shape), e5m2, powers)
    whole = x.abs().amax()
    x, largest = blocks_of(x, BLOCKS[format_], square)
    if format_ == "fp8_blockwise":
        return to_fp8(x, largest, e5m2, powers)[:rows]
    if format_ == "mxfp8":
        scale = power_above(largest / (57344.0 if e5m2 else 448.0))
        return ((x / scale).to(torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn).double() * scale.double())[:rows]
    random = None
    if random_of is not None:
        places = torch.arange(len(x))[:, None], torch.arange(x.shape[1] // 16)[None]
        random = block_random(*random_of, *places).flatten(1)
    if format_ == "mxfp4":
        scale = power_above(largest / 6.0)
        return (to_e2m1(x / scale, random).double() * scale.double())[:rows]
    tensor_scale = torch.tensor(448.0 * 6.0) / whole
    scale = (largest * (tensor_scale * torch.tensor(1.0 / 6.0))).clamp(max=448.0).to(torch.float8_e4m3fn).float()
    factor = torch.where(scale > 0, 1.0 / (scale * (1.0 / tensor_scale)), 0.0)
    return (to_e2m1(x * factor, random).double() * scale.double() * whole.double() / (448.0 * 6.0))[:rows]


def to_fp8(x: Tensor, largest: Tensor, e5m2: bool, powers: bool) -> Tensor:
    """Scaled so that ``largest`` becomes the largest number of the format."""
    top, dtype = (57344.0, torch.float8_e5m2) if e5m2 else (448.0, torch.float8_e4m3fn)
    # Tensor by tensor: a number by a tensor is a product with its reciprocal, rounded twice.
    factor = torch.where(largest > 0, torch.full_like(largest, top) / largest, 1.0)
    factor = torch.exp2(torch.floor(torch.log2(factor.double()))).float() if powers else factor
    return (x * factor).clamp(-top, top).to(dtype).double() / factor.double()


def power_above(x: Tensor) -> Tensor:
    """The smallest power of two that is not below ``x``."""
    return torch.where(x > 0, torch.exp2(torch.ceil(torch.log2(x.double().clamp(min=2.0**-127)))), 2.0**-127).float()


def linear(
    x: Tensor, weight: Tensor, dy: Tensor, options: PrecisionOptions, state: PrecisionState, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dW by ``options``, float64."""
    format_ = options.recipe
    four = format_ in ("nvfp4", "mxfp4")

    def on(switch: bool | None, default: bool) -> bool:
        return default if switch is None else switch

    square = on(options.weights_2d, four or format_ == "fp8_blockwise")
    signs = state.signs[: BLOCKS[format_]] if on(options.hadamard, four) else None
    seed = state.rounding_seed(name, "gradient") if on(options.stochastic_rounding, four) else None
    e5m2 = (options.gradient_format or ("e5m2" if format_ == "fp8_tensorwise" else "e4m3")) == "e5m2"
    powers = options.power_of_two_scales
    results = [x.double() @ weight.double().T, dy.double() @ weight.double(), dy.double().T @ x.double()]
    if "forward" in options.gemms:
        results[0] = quantized_rows(x, format_, powers=powers) @ quantized_rows(weight, format_, square, powers=powers).T
    if "input_gradient" in options.gemms:
        rows = quantized_rows(dy, format_, random_of=None if seed is None else (seed, 0), e5m2=e5m2, powers=powers)
        results[1] = rows @ quantized_rows(weight.T, format_, square, powers=powers).T
    if "weight_gradient" in options.gemms:
        columns = quantized_rows(dy.T, format_, signs=signs, random_of=None if seed is None else (seed, 1), e5m2=e5m2, powers=powers)
        results[2] = columns @ quantized_rows(x.T, format_, signs=signs, powers=powers).T
    return results[0], results[1], results[2]
