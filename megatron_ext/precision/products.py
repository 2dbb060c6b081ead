"""Matrix products of quantized operands, and what computes them."""

import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.emulated_mm import emulated_mm, operand_dtype
from megatron_ext.kernels.fp8_gemm import fp8_gemm
from megatron_ext.kernels.fp8_gemm import select_backend as select_fp8_backend
from megatron_ext.kernels.mxfp4_quantize import mxfp4_dequantize
from megatron_ext.kernels.nvfp4_gemm import nvfp4_gemm
from megatron_ext.kernels.nvfp4_gemm import select_backend as select_nvfp4_backend
from megatron_ext.kernels.quantized import FP8Tensor, MXFP4Tensor, NVFP4Tensor
from megatron_ext.precision.operands import Part, Quantized, quantize
from megatron_ext.precision.recipe import Gemm, LinearRecipe

PROBE = 256
"""Rows and columns of matrices that native products are asked about: more than one block of any recipe."""


def product(a: Quantized, b: Quantized, dtype: torch.dtype, backend: str) -> Tensor:
    """a b^T of [M, K] and [N, K] of one format.

    Args:
        a: [M, K].
        b: [N, K].
        dtype: of the result, bfloat16 or float32. Sums are of float32.
        backend: ``auto``, ``emulated`` or ``native``, as in ``PrecisionOptions``.

    Returns:
        [M, N] in ``dtype``.

    Raises:
        ConfigError: ``native`` cannot run.
    """
    if isinstance(a, NVFP4Tensor) and isinstance(b, NVFP4Tensor):
        return nvfp4_gemm(a, b, out_dtype=dtype, backend=_kernel_backend(backend, a))
    if isinstance(a, FP8Tensor) and isinstance(b, FP8Tensor):
        return fp8_gemm(a, b, out_dtype=dtype, backend=_kernel_backend(backend, a))
    assert isinstance(a, MXFP4Tensor) and isinstance(b, MXFP4Tensor), "operands of a product have one format"
    wide = operand_dtype(a.codes.device)
    return emulated_mm(mxfp4_dequantize(a, wide), mxfp4_dequantize(b, wide)).to(dtype)


def select_backends(recipe: LinearRecipe, backend: str, device: torch.device) -> str:
    """What computes the products of a linear on ``device``, and why, for people.

    Raises:
        ConfigError: ``native`` cannot run; says what can.
    """
    gemms = {"forward": recipe.forward, "input gradient": recipe.input_gradient, "weight gradient": recipe.weight_gradient}
    chosen: dict[str, list[str]] = {}
    for name, gemm in gemms.items():
        if gemm is not None:
            chosen.setdefault(_select(gemm, backend, device), []).append(name)
    if len(chosen) == 1:
        return next(iter(chosen))
    return "; ".join(f"{', '.join(names)}: {what}" for what, names in chosen.items())


def _select(gemm: Gemm, backend: str, device: torch.device) -> str:
    x = torch.zeros(PROBE, PROBE, device=device)
    signs = torch.ones(32 if gemm.a.format.startswith("mx") else 16, device=device)
    a, b = (quantize(x, None, operand, Part(seed=0, signs=signs))[1] for operand in (gemm.a, gemm.b))
    if isinstance(a, MXFP4Tensor):
        return "emulated (no device is asked for native MXFP4)"
    try:
        if isinstance(a, FP8Tensor) and isinstance(b, FP8Tensor):
            name, why = select_fp8_backend(_kernel_backend(backend, a), a, b)
        else:
            assert isinstance(a, NVFP4Tensor), "formats are these three"
            name, why = select_nvfp4_backend(_kernel_backend(backend, a), device, PROBE, PROBE)
    except ConfigError as error:
        raise ConfigError(f"precision.backend: {backend!r}; accepted with {gemm.a.format} here: auto, emulated, because {error}") from error
    return f"native ({why})" if name == "native" else f"emulated ({why})"


def _kernel_backend(backend: str, x: NVFP4Tensor | FP8Tensor) -> str:
    """The name that the kernel has for it."""
    if backend != "emulated":
        return backend
    compiled = isinstance(x, NVFP4Tensor) and x.codes.device.type in ("cpu", "cuda")
    return x.codes.device.type if compiled else "torch"
