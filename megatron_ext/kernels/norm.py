"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467, equation 4) and SSNorm (Park et al. 2025, arXiv:2506.19697), forward and backward.

y = x / sqrt(mean(x^2) + eps) * weight over the last dimension. RMSNorm has a weight for each channel, SSNorm one gain for all of them: but
for a factor sqrt(n) this is ScaleNorm (Nguyen and Salazar 2019, arXiv:1910.05895).

Backend ``torch`` is the definition. What is rounded when, in all backends: x + residual to the dtype of x; x / sqrt(...), computed in
float32 (float64 for float64), to the dtype of x, as transformers does it; the product with the weight again. Each gradient is computed in
float32 and rounded once.

The gradient of the weight is a sum over rows in an order that the shape alone decides. ``cpu``: 8 rows one after another and 8 such sums
one after another in float32, then these sums of 64 rows in float64; with one gain, a float64 number a row. ``triton``: one float32 sum of
neighbouring rows for each of ``PROGRAMS`` programs, then these sums. With one gain neither keeps anything of the width of x.
"""

import importlib
import os
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.errors import ConfigError
from megatron_ext.kernels import native

BACKENDS = ("auto", "torch", *native.INSTRUCTIONS, "triton")


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    backend: str = "auto",
    threads: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise the last dimension of ``x``, or of ``x + residual``, and scale it. Keeps its input and one number a row for backward.

    Args:
        x: [..., n] float32 or bfloat16; with backend ``torch`` any floating-point dtype. Rows may lie apart (a slice of columns); any other
            strides cost a copy.
        weight: [n] (RMSNorm), or one element (SSNorm: a gain for all channels); any floating-point dtype, of compiled backends those of x.
        eps: added to the mean square.
        residual: shape and dtype of ``x``: is added to it first.
        backend: as in ``select_backend``.
        threads: of the CPU; None: as many as PyTorch uses. No bit depends on it.

    Returns:
        y, shape and dtype of ``x``; with a residual (y, x + residual), which both may be used further, and differentiated.

    Raises:
        ConfigError: an argument is none of the above, or the backend cannot run.
    """
    check(x, weight, residual)
    name, _ = select_backend(backend, x.device, x.dtype, weight.dtype)
    return _RMSNorm.apply(x, residual, weight, eps, name, threads or 0)


def ss_norm(
    x: Tensor, gain: Tensor, eps: float = 1e-6, *, residual: Tensor | None = None, backend: str = "auto", threads: int | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """``rms_norm`` with a ``gain`` of one element. Raises ConfigError for any other."""
    if gain.numel() != 1:
        raise ConfigError(f"ss_norm's gain is {list(gain.shape)}; accepted is one element")
    return rms_norm(x, gain, eps, residual=residual, backend=backend, threads=threads)


def select_backend(name: str, device: torch.device, *dtypes: torch.dtype) -> tuple[str, str]:
    """The backend that runs when ``name`` is asked for on ``device`` for tensors of ``dtypes``, and why.

    ``auto`` is, for float32 and bfloat16, ``cpu`` on the CPU and on CUDA ``triton`` where it can run; everything else, float64 included, is
    for ``torch``.

    Raises:
        ConfigError: ``name`` is none of ``BACKENDS``, or the backend cannot run.
    """
    if name not in BACKENDS:
        raise ConfigError(f"backend is {name!r}; accepted are {', '.join(BACKENDS)}")
    compiled = {"cpu": "cpu", "cuda": "triton"}.get(device.type, "torch") if name == "auto" else name
    obstacle = _obstacle(compiled, device, dtypes)
    if name == "auto":
        return ("torch", f"auto: {compiled} {obstacle}") if obstacle else (compiled, f"auto: on {device.type}")
    if obstacle:
        raise ConfigError(f"norm backend is {name!r}, which {obstacle}; able to run here: {', '.join(_able(device, dtypes))}")
    return name, "as asked for"


def check(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    """Raises ConfigError unless the arguments of ``rms_norm`` fit together."""
    if x.ndim == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ConfigError(f"norm of {list(x.shape)} in {x.dtype}; accepted are [..., n] of floating-point numbers with n of 1 or more")
    if weight.numel() != 1 and weight.shape != x.shape[-1:]:
        raise ConfigError(f"norm of {list(x.shape)} with weight {list(weight.shape)}; accepted are {list(x.shape[-1:])} and one element")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ConfigError(
            f"norm of {list(x.shape)} in {x.dtype} with residual {list(residual.shape)} in {residual.dtype}; they have to agree"
        )


def rows_of(x: Tensor) -> Tensor:
    """``x`` as [rows, n] with neighbouring values of a row together: a view where there is one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, backend: str, threads: int) -> Any:
        y, inverse_rms, *sums = _forward(backend)(
            rows_of(x), None if residual is None else rows_of(residual), weight, eps, backend, threads
        )
        total = sums[0].view(x.shape) if sums else x
        ctx.save_for_backward(total, weight, inverse_rms)
        ctx.backend, ctx.threads = backend, threads
        ctx.set_materialize_grads(False)
        return (y.view(x.shape), total) if sums else y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_sum: Tensor | None = None) -> tuple[Tensor | None, ...]:
        total, weight, inverse_rms = ctx.saved_tensors
        needs_x, needs_residual, needs_weight = ctx.needs_input_grad[:3]
        if grad is None:
            return (grad_sum if needs_x else None, grad_sum if needs_residual else None, *[None] * 4)
        of_sum = None if grad_sum is None else rows_of(grad_sum)
        grad_x, *grad_weight = _backward(ctx.backend)(
            rows_of(total), rows_of(grad), of_sum, weight, inverse_rms, needs_weight, ctx.backend, ctx.threads
        )
        grad_x = grad_x.view(total.shape)
        grad_weight = grad_weight[0].view(weight.shape).to(weight.dtype) if needs_weight else None
        return (grad_x if needs_x else None, grad_x if needs_residual else None, grad_weight, *[None] * 3)


def _forward(backend: str) -> Any:
    """(x [rows, n], residual or None, weight, eps, backend, threads) -> [y, 1 / rms [rows], x + residual where there is one]."""
    return {"torch": _defined, "triton": _triton}.get(backend, _compiled)


def _backward(backend: str) -> Any:
    """(x + residual [rows, n], gradient of y, that of x + residual or None, weight, 1 / rms, whether the weight's gradient is wanted,
    backend, threads) -> [gradient of x, that of the weight if it is wanted]."""
    return {"torch": _defined_backward, "triton": _triton_backward}.get(backend, _compiled_backward)


def _defined(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, backend: str, threads: int) -> list[Tensor]:
    sums = [] if residual is None else [x + residual]
    wide = (x if residual is None else sums[0]).to(torch.promote_types(x.dtype, torch.float32))
    inverse_rms = _mean_square(wide).add_(eps).rsqrt_()
    return [(wide * inverse_rms).to(x.dtype).mul_(weight.view(-1)), inverse_rms.squeeze(-1), *sums]


def _mean_square(x: Tensor) -> Tensor:
    if x.dtype == torch.float64:  # of tests, which ask for the bits of F.rms_norm
        return x.square().mean(-1, keepdim=True)
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])


def _defined_backward(
    x: Tensor, grad: Tensor, grad_sum: Tensor | None, weight: Tensor, inverse_rms: Tensor, with_weight: bool, backend: str, threads: int
) -> list[Tensor]:  # fmt: skip
    scale = inverse_rms[:, None]
    wide_x, wide_grad, wide_weight = (tensor.to(scale.dtype) for tensor in (x, grad, weight.view(-1)))
    # Sums as products of matrices, which read memory once.
    product = wide_x * wide_grad
    along_x = (product @ wide_weight.expand(x.shape[-1]))[:, None].mul_(scale.pow(3)).div_(-x.shape[-1])
    of_channels = (inverse_rms[None] @ product)[0] if with_weight else product.new_empty(0)
    grad_x = torch.mul(wide_grad, wide_weight, out=product).mul_(scale).addcmul_(wide_x, along_x)
    if grad_sum is not None:
        grad_x += grad_sum
    of_weight = [of_channels.sum() if weight.numel() == 1 else of_channels] if with_weight else []
    return [grad_x.to(x.dtype), *of_weight]


@torch.library.custom_op("megatron_ext::rms_norm", mutates_args=())
def _compiled(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, backend: str, threads: int) -> list[Tensor]:
    outputs = _outputs(x, residual)
    y, inverse_rms, total = outputs if residual is not None else (*outputs, None)
    gains = weight.float().contiguous()
    if x.numel():
        native.call(
            "norm", "rms_norm", backend, threads, x, x.stride(0), residual, 0 if residual is None else residual.stride(0),
            x.dtype, *x.shape, gains, gains.numel() == 1, eps, y, total, inverse_rms,
        )  # fmt: skip
    return outputs


@_compiled.register_fake
def _(x: Tensor, residual: Tensor | None, *arguments: object) -> list[Tensor]:
    return _outputs(x, residual)


def _outputs(x: Tensor, residual: Tensor | None) -> list[Tensor]:
    sums = [] if residual is None else [x.new_empty(x.shape)]
    return [x.new_empty(x.shape), x.new_empty(len(x), dtype=torch.float32), *sums]


@torch.library.custom_op("megatron_ext::rms_norm_backward", mutates_args=())
def _compiled_backward(
    x: Tensor, grad: Tensor, grad_sum: Tensor | None, weight: Tensor, inverse_rms: Tensor, with_weight: bool, backend: str, threads: int
) -> list[Tensor]:  # fmt: skip
    outputs = _gradients(x, weight, with_weight)
    gains = weight.float().contiguous()
    native.call(
        "norm", "rms_norm_backward", backend, threads, x, x.stride(0), grad, grad.stride(0),
        grad_sum, 0 if grad_sum is None else grad_sum.stride(0), x.dtype, *x.shape, gains, gains.numel() == 1, inverse_rms,
        outputs[0], outputs[1] if with_weight else None,
    )  # fmt: skip
    return outputs


@_compiled_backward.register_fake
def _(x: Tensor, grad: Tensor, grad_sum: Tensor | None, weight: Tensor, inverse_rms: Tensor, with_weight: bool, *arguments: object) -> Any:
    return _gradients(x, weight, with_weight)


def _gradients(x: Tensor, weight: Tensor, with_weight: bool) -> list[Tensor]:
    return [x.new_empty(x.shape), *([weight.new_empty(weight.numel(), dtype=torch.float32)] if with_weight else [])]


def _triton(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, backend: str, threads: int) -> list[Tensor]:
    return _twin().normalize(x, residual, weight, eps)


def _triton_backward(*arguments: Any) -> list[Tensor]:
    return _twin().differentiate(*arguments[:6])


@cache
def _twin() -> ModuleType:
    # Not at the top: it needs Triton.
    return importlib.import_module("megatron_ext.csrc.triton.norm")


def _able(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> list[str]:
    return [each for each in ("torch", "cpu", "triton") if _obstacle(each, device, dtypes) is None]


def _obstacle(backend: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why ``backend`` cannot run on ``device`` with ``dtypes``, or None if it can."""
    if backend == "torch":
        return None
    if any(dtype not in native.TYPES for dtype in dtypes):
        return f"takes {', '.join(map(str, native.TYPES))}, not {', '.join(map(str, dtypes))}"
    if backend != "triton":
        return None if device.type == "cpu" else f"needs tensors on cpu, not on {device.type}"
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
