"""Products of NVFP4 matrices: natively on Blackwell, and with the same numbers emulated everywhere.

An E2M1 number times an E4M3 scale has at most 6 significant bits and lies within 2^-10 and 2688: it is exact in bfloat16. So the emulation
multiplies the values without the tensor scales as bfloat16 (on the CPU as float32), sums in float32, and multiplies sums by
alpha = (amax_a / 2688) (amax_b / 2688) before they are rounded once. For ordinary data the sums are exact, whatever their order; they
cannot be where the scales of a row vary by many octaves.
"""

import importlib
import os
from dataclasses import replace
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels import native
from megatron_ext.kernels.emulated_mm import emulated_mm, operand_dtype
from megatron_ext.kernels.nvfp4_quantize import nvfp4_dequantize
from megatron_ext.kernels.quantized import NVFP4Tensor
from megatron_ext.kernels.scaled_mm import nvfp4_obstacle, nvfp4_scaled_mm

BACKENDS = ("auto", "torch", "cpu", "cuda", "triton", "native")
LARGEST = 6.0 * 448.0
"""Of an E2M1 number times an E4M3 scale: the tensor scale is amax / LARGEST."""
FEW_ROWS = 128
"""Up to here one side is so short that a product takes as long as reading the other, which has 3.6 times fewer bytes as codes than as
bfloat16. Chosen by counting bytes and operations, not by measurement."""


def nvfp4_gemm(a: NVFP4Tensor, b: NVFP4Tensor, *, out_dtype: torch.dtype = torch.bfloat16, backend: str = "auto") -> Tensor:
    """a b^T.

    Args:
        a: [M, K], blocks of either kind.
        b: [N, K]. Both transformed with the same signs, which cancels, or neither.
        out_dtype: float32 or bfloat16.
        backend: as in ``select_backend``.

    Returns:
        [M, N] in ``out_dtype``, rounded once (where the sums are exact: all backends have the same bits).

    Raises:
        ConfigError: shapes, transforms, types or devices do not fit, or the backend cannot run.
    """
    _check(a, b, out_dtype)
    rows, columns = a.shape[0], b.shape[0]
    name, _ = select_backend(backend, a.codes.device, rows, columns)
    if not (a.codes.numel() and b.codes.numel()):
        return a.codes.new_zeros(rows, columns, dtype=out_dtype)
    tensor_scales = (a.amax / LARGEST, b.amax / LARGEST)
    if name == "native":
        return nvfp4_scaled_mm(a, b, tensor_scales, out_dtype)
    alpha = tensor_scales[0] * tensor_scales[1]
    if name == "triton":
        return _twin().nvfp4_product(a, b, alpha, out_dtype)
    total = emulated_mm(_block_scaled(a, name), _block_scaled(b, name))
    return torch.mul(total, alpha, out=torch.empty_like(total, dtype=out_dtype))


def select_backend(name: str, device: torch.device, rows: int, columns: int) -> tuple[str, str]:
    """The backend that runs when ``name`` is asked for on ``device`` for a product [rows, columns], and why.

    ``native`` is PyTorch's scaled_mm. The others are emulations, at training sizes never faster than a product in bfloat16 (on the CPU:
    float32): ``torch``, the definition, and ``cpu`` and ``cuda``, which decode with compiled kernels, have its bits and leave the product
    to PyTorch; ``triton`` decodes in registers. ``auto`` is ``native`` where it can run; else on CUDA ``triton`` where one side has at
    most ``FEW_ROWS`` rows, and ``cuda`` for more; on the CPU ``cpu``.

    Raises:
        ConfigError: ``name`` is none of ``BACKENDS``, or the backend cannot run.
    """
    if name not in BACKENDS:
        raise ConfigError(f"nvfp4_gemm backend is {name!r}; accepted are {', '.join(BACKENDS)}")
    obstacles = {each: _obstacle(each, device) for each in BACKENDS[1:]}
    able = [each for each, obstacle in obstacles.items() if obstacle is None]
    if name != "auto":
        if obstacles[name]:
            raise ConfigError(f"nvfp4_gemm backend is {name!r}, which {obstacles[name]}; able to run here: {', '.join(able)}")
        return name, "as asked for"
    if "native" in able:
        return "native", "auto: this GPU multiplies NVFP4"
    if device.type == "cuda" and "triton" in able and min(rows, columns) <= FEW_ROWS:
        return "triton", f"auto: emulated, at most {FEW_ROWS} rows on one side"
    compiled = device.type if device.type in able else "torch"
    return compiled, f"auto: emulated on {device.type}"


def _check(a: NVFP4Tensor, b: NVFP4Tensor, out_dtype: torch.dtype) -> None:
    if a.shape[1] != b.shape[1] or a.codes.device != b.codes.device:
        raise ConfigError(
            f"nvfp4_gemm of {list(a.shape)} on {a.codes.device} with {list(b.shape)} on {b.codes.device}; K and device have to agree"
        )
    # On a GPU, comparing values waits for it; the same tensor needs no comparing.
    same = a.signs is b.signs or (a.signs is not None and b.signs is not None and torch.equal(a.signs, b.signs))
    if not same:
        ways = ["no transform" if x.signs is None else f"signs {x.signs.int().tolist()}" for x in (a, b)]
        raise ConfigError(f"nvfp4_gemm of {ways[0]} with {ways[1]}; both have to be transformed with the same signs, or neither")
    if out_dtype not in native.TYPES:
        raise ConfigError(f"nvfp4_gemm out_dtype is {out_dtype}; accepted are {', '.join(map(str, native.TYPES))}")


def _block_scaled(x: NVFP4Tensor, backend: str) -> Tensor:
    """E2M1 numbers times E4M3 scales, [M, K'], exact: what is dequantized with a tensor scale of 1."""
    plain = replace(x, amax=torch.full_like(x.amax, LARGEST), signs=None, shape=(x.shape[0], 2 * x.codes.shape[1]))
    return nvfp4_dequantize(plain, operand_dtype(x.codes.device), backend=backend)


def _obstacle(backend: str, device: torch.device) -> str | None:
    """Why ``backend`` cannot run on ``device``, or None if it can."""
    match backend:
        case "native":
            obstacle = nvfp4_obstacle(device)
            return f"is PyTorch's scaled_mm, which {obstacle}" if obstacle else None
        case "triton":
            return _triton_obstacle(device)
        case "cpu" | "cuda" if backend != device.type:
            return f"needs tensors on {backend}, not on {device.type}"
    return None


def _triton_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs a CUDA device, not {device.type}, or Triton's interpreter (TRITON_INTERPRET=1)"
    return None if _importable("triton") else "needs the package triton, which cannot be imported"


@cache
def _importable(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


@cache
def _twin() -> ModuleType:
    # Not at the top: it needs Triton.
    return importlib.import_module("megatron_ext.csrc.triton.nvfp4_gemm")
