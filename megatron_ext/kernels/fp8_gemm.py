"""Products of FP8 matrices: PyTorch's scaled_mm on GPUs that have the format, and the same numbers summed in float32 everywhere.

The definition: where one scale holds for the whole of K, codes are multiplied and summed in float32, then the sums are
multiplied by the scales of ``a``, then by those of ``b``. Where blocks divide K, the operands are codes times scales in float32, which is
exact for powers of two, as those of MXFP8. Hardware applies the scales of blocks to their sums (DeepSeek-V3, arXiv:2412.19437, section
3.3.2): the same but for roundings of float32.
"""

from dataclasses import replace

import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels import native
from megatron_ext.kernels.emulated_mm import emulated_mm, operand_dtype
from megatron_ext.kernels.fp8_quantize import fp8_dequantize
from megatron_ext.kernels.quantized import FP8Tensor
from megatron_ext.kernels.scaled_mm import fp8_obstacle, fp8_scaled_mm

BACKENDS = ("auto", "torch", "cpu", "cuda", "native")


def fp8_gemm(
    a: FP8Tensor,
    b: FP8Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
    fast_accumulation: bool = False,
) -> Tensor:
    """a b^T.

    Args:
        a: [M, K], any of float8_e4m3fn and float8_e5m2.
        b: [N, K], with blocks of as many columns as those of ``a``: both one scale for the whole of K, or both the same width (1 x 128
            with 128 x 128, 1 x 32 with float8_e8m0fnu).
        out_dtype: float32 or bfloat16.
        backend: as in ``select_backend``.
        fast_accumulation: let ``native`` on Hopper sum all of K in the fewer bits of its tensor cores.

    Returns:
        [M, N] in ``out_dtype``, rounded once. ``native`` on Hopper sums with 13 bits after the point: exact where that is enough.

    Raises:
        ConfigError: shapes, blocks, types or devices do not fit, or the backend cannot run.
    """
    _check(a, b, out_dtype)
    name, _ = select_backend(backend, a, b)
    if not (a.codes.numel() and b.codes.numel()):
        return a.codes.new_zeros(a.shape[0], b.shape[0], dtype=out_dtype)
    if name == "native":
        return fp8_scaled_mm(a, b, out_dtype, fast_accumulation)
    return _emulated(a, b, name).to(out_dtype)


def select_backend(name: str, a: FP8Tensor, b: FP8Tensor) -> tuple[str, str]:
    """The backend that runs when ``name`` is asked for with ``a`` and ``b``, and why.

    ``native`` is PyTorch's scaled_mm. The others are emulations, never faster than a product in bfloat16 (on the CPU: float32): ``torch``,
    the definition, and ``cpu`` and ``cuda``, which decode with compiled kernels and have its bits. ``auto`` is ``native`` on CUDA where it
    can run, else ``cuda`` or ``cpu``, which on the CPU is faster than ``native``.

    Raises:
        ConfigError: ``name`` is none of ``BACKENDS``, or the backend cannot run.
    """
    if name not in BACKENDS:
        raise ConfigError(f"fp8_gemm backend is {name!r}; accepted are {', '.join(BACKENDS)}")
    kind = a.codes.device.type
    obstacles = {each: _obstacle(each, a, b) for each in BACKENDS[1:]}
    able = [each for each, obstacle in obstacles.items() if obstacle is None]
    if name != "auto":
        if obstacles[name]:
            raise ConfigError(f"fp8_gemm backend is {name!r}, which {obstacles[name]}; able to run here: {', '.join(able)}")
        return name, "as asked for"
    if kind == "cuda" and "native" in able:
        return "native", "auto: PyTorch's scaled_mm runs it"
    why = f"auto: emulated on {kind}" + (f", as native {obstacles['native']}" if kind == "cuda" else "")
    return (kind if kind in able else "torch"), why


def _check(a: FP8Tensor, b: FP8Tensor, out_dtype: torch.dtype) -> None:
    for x in (a, b):
        expected = tuple(-(-size // length) for size, length in zip(x.shape, x.block, strict=True)) if x.codes.numel() else x.scales.shape
        if x.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2) or tuple(x.scales.shape) != expected:
            raise ConfigError(f"fp8_gemm of {list(x.shape)} in {x.dtype} with blocks of {x.block} and scales {list(x.scales.shape)}")
    if a.shape[1] != b.shape[1] or a.codes.device != b.codes.device:
        raise ConfigError(
            f"fp8_gemm of {list(a.shape)} on {a.codes.device} with {list(b.shape)} on {b.codes.device}; K and device have to agree"
        )
    powers = [x.scales.dtype == torch.float8_e8m0fnu for x in (a, b)]
    widths = [x.block[1] if x.scales.shape[1] > 1 else x.shape[1] for x in (a, b)]
    if widths[0] != widths[1] or powers[0] != powers[1]:
        ways = [f"{x.block} with {x.scales.dtype}" for x in (a, b)]
        raise ConfigError(f"fp8_gemm of blocks of {ways[0]}, and of {ways[1]}; columns of a block and types have to agree")
    if out_dtype not in native.TYPES:
        raise ConfigError(f"fp8_gemm out_dtype is {out_dtype}; accepted are {', '.join(map(str, native.TYPES))}")


def _obstacle(backend: str, a: FP8Tensor, b: FP8Tensor) -> str | None:
    """Why ``backend`` cannot multiply ``a`` and ``b``, or None if it can."""
    kind = a.codes.device.type
    match backend:
        case "native":
            obstacle = fp8_obstacle(a, b)
            return f"is PyTorch's scaled_mm, which {obstacle}" if obstacle else None
        case "cpu" | "cuda" if backend != kind:
            return f"needs tensors on {backend}, not on {kind}"
    return None


def _emulated(a: FP8Tensor, b: FP8Tensor, decoder: str) -> Tensor:
    """The definition, before it is rounded: float32 [M, N]."""
    if a.scales.shape[1] > 1:
        exact = a.scales.dtype == torch.float8_e8m0fnu
        dtype = operand_dtype(a.codes.device) if exact else torch.float32
        return emulated_mm(*(fp8_dequantize(x, dtype, backend=decoder) for x in (a, b)))
    left, right = (x.scales.float().repeat_interleave(x.block[0], 0)[: x.shape[0]] for x in (a, b))
    return emulated_mm(_numbers(a, decoder), _numbers(b, decoder)).mul_(left).mul_(right.mT)


def _numbers(x: FP8Tensor, decoder: str) -> Tensor:
    """What the codes are without their scales, [M, K], exact."""
    plain = replace(x, scales=torch.ones(1, 1, device=x.codes.device), block=x.shape)
    return fp8_dequantize(plain, operand_dtype(x.codes.device), backend=decoder)
