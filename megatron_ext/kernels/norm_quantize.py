"""RMSNorm and SSNorm of which only the quantized result is kept, in one pass; backend ``torch``, the definition, is one after the other."""

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels import native
from megatron_ext.kernels.fp8_quantize import fp8_quantize
from megatron_ext.kernels.norm import check, rms_norm, rows_of, select_backend
from megatron_ext.kernels.nvfp4_quantize import nvfp4_quantize
from megatron_ext.kernels.quantized import FP8Tensor, NVFP4Tensor

FORMATS = ("fp8_blockwise", "nvfp4")


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    format: str = "fp8_blockwise",
    amax: Tensor | None = None,
    power_of_two: bool = False,
    backend: str = "auto",
    threads: int | None = None,
) -> FP8Tensor | NVFP4Tensor | tuple[FP8Tensor | NVFP4Tensor, Tensor]:
    """Quantize the rows of ``rms_norm(x, weight, eps, residual=residual)``, with its bits and those of the quantizer.

    There is no backward: for evaluation, and for forward passes whose backward is written out.

    Args:
        x: [M, K] float32 or bfloat16; strides as of ``rms_norm``.
        weight: [K] or one element.
        eps: added to the mean square.
        residual: shape and dtype of ``x``: is added to it first.
        format: "fp8_blockwise": ``fp8_quantize(y, scaling="1x128")``; "nvfp4": ``nvfp4_quantize(y, amax=amax)``.
        amax: float32 [], of "nvfp4" only: the largest magnitude that its scales provide for. It has to be known before a row is quantized,
            as from the step before: |y| is at most sqrt(K) max |weight|.
        power_of_two: scales of "fp8_blockwise", as of ``fp8_quantize``.
        backend: as in ``norm.select_backend``.
        threads: of the CPU; None: as many as PyTorch uses. No bit depends on it.

    Returns:
        The quantized y [M, K]; with a residual (quantized y, x + residual).

    Raises:
        ConfigError: an argument is none of the above, a gradient is wanted, or the backend cannot run.
    """
    check(x, weight, residual)
    native.check_matrix(x, "norm and quantization")
    _check_format(format, amax, power_of_two)
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, weight, residual)):
        raise ConfigError("rms_norm_quantize has no backward, but an argument requires a gradient; accepted is torch.no_grad()")
    name, _ = select_backend(backend, x.device, x.dtype, weight.dtype)
    if name == "torch":
        result = rms_norm(x, weight, eps, residual=residual, backend="torch")
        y, *sums = (result,) if residual is None else result
        codes = _quantized(y, format, amax, power_of_two)
    else:
        codes, *sums = _fused(x, residual, weight, eps, format, amax, power_of_two, name, threads or 0)
    return (codes, sums[0]) if sums else codes


def _check_format(format: str, amax: Tensor | None, power_of_two: bool) -> None:
    if format not in FORMATS:
        raise ConfigError(f"rms_norm_quantize's format is {format!r}; accepted are {', '.join(FORMATS)}")
    if (format == "nvfp4") != (amax is not None) or (amax is not None and amax.numel() != 1):
        seen = "None" if amax is None else list(amax.shape)
        raise ConfigError(f"rms_norm_quantize's amax is {seen} for {format}; accepted are [] for nvfp4, None for fp8_blockwise")
    if format == "nvfp4" and power_of_two:
        raise ConfigError("rms_norm_quantize's power_of_two is True for nvfp4; accepted is False")


def _quantized(y: Tensor, format: str, amax: Tensor | None, power_of_two: bool) -> FP8Tensor | NVFP4Tensor:
    if format == "nvfp4":
        return nvfp4_quantize(y, amax=amax, backend="torch")
    return fp8_quantize(y, scaling="1x128", power_of_two=power_of_two, backend="torch")


def _fused(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, format: str, amax: Tensor | None, power_of_two: bool, backend: str,
    threads: int,
) -> tuple[FP8Tensor | NVFP4Tensor, *tuple[Tensor, ...]]:  # fmt: skip
    amax = None if amax is None else amax.to(x.device, torch.float32).reshape(())
    residual = None if residual is None else rows_of(residual)
    x = rows_of(x)
    if backend == "triton":
        outputs = _outputs(x, residual, amax)
        _twin().normalize_and_quantize(x, residual, weight, eps, outputs, amax, power_of_two)
    else:
        outputs = _compiled(x, residual, weight, eps, amax, power_of_two, backend, threads)
    codes, scales, found, *sums = outputs
    if amax is None:
        return FP8Tensor(codes, scales, found, (1, 128)), *sums
    return NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), amax, tuple(x.shape)), *sums


@cache
def _twin() -> ModuleType:
    # Not at the top: it needs Triton.
    return importlib.import_module("megatron_ext.csrc.triton.norm_quantize")


@torch.library.custom_op("megatron_ext::rms_norm_quantize", mutates_args=())
def _compiled(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, amax: Tensor | None, power_of_two: bool, backend: str, threads: int
) -> list[Tensor]:  # fmt: skip
    outputs = _outputs(x, residual, amax)
    codes, scales, found, total = outputs if residual is not None else (*outputs, None)
    gains = weight.float().contiguous()
    native.call(
        "norm_quantize", "rms_norm_quantize", backend, threads, x, x.stride(0), residual, 0 if residual is None else residual.stride(0),
        x.dtype, *x.shape, gains, gains.numel() == 1, eps, total, amax, power_of_two, codes, scales, found,
    )  # fmt: skip
    return outputs


@_compiled.register_fake
def _(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, amax: Tensor | None, *arguments: object) -> list[Tensor]:
    return _outputs(x, residual, amax)


def _outputs(x: Tensor, residual: Tensor | None, amax: Tensor | None) -> list[Tensor]:
    """Codes, scales, amax of blocks (of NVFP4 empty), and x + residual where there is one."""
    rows, width = x.shape
    sums = [] if residual is None else [x.new_empty(x.shape)]
    if amax is None:
        blocks = (rows, (width + 127) // 128)
        return [x.new_empty(x.shape, dtype=torch.uint8), *(x.new_empty(blocks, dtype=torch.float32) for _ in range(2)), *sums]
    blocks = (width + 15) // 16
    parts = [x.new_empty(rows, 8 * blocks, dtype=torch.uint8), x.new_empty(rows, blocks, dtype=torch.uint8)]
    return [*parts, x.new_empty(0, dtype=torch.float32), *sums]
