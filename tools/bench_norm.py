"""RMSNorm and SSNorm, forward and backward, beside PyTorch's F.rms_norm and a copy, and with quantization beside the norm alone.

Tables of seconds compare whole steps, forward and backward through autograd, with PyTorch's. Tables of bytes say how near single kernels
are to a copy: see bench_memory.py. A norm with quantization writes less than the norm, so its milliseconds are what to compare.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from bench_memory import COPY, copy
from torch import Tensor

from megatron_ext.kernels.norm import rms_norm
from megatron_ext.kernels.norm_quantize import rms_norm_quantize

TOKENS, WIDTH = 32768, 8192
"""Divided by the scale; at 8, which is the default, 4096 x 1024."""
EPS = 1e-6
Norm = Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]


def cases(options: Any) -> Iterator[Any]:
    """For ``bench_kernels.py``: steps of each kind, then bytes a second of single kernels."""
    from bench_kernels import Case

    shape = (TOKENS // options.scale, WIDTH // options.scale)
    x, residual, grad, weight = (torch.randn(size, device=options.device).to(options.dtype) for size in (shape, shape, shape, shape[1:]))
    title = f"{list(shape)}, {str(options.dtype).removeprefix('torch.')}"
    kinds: dict[str, tuple[Tensor, Norm, Norm]] = {
        "rms_norm": (weight, _pytorch, lambda x, weight, residual: [rms_norm(x, weight, EPS)]),
        "ss_norm": (weight[:1], _pytorch, lambda x, weight, residual: [rms_norm(x, weight, EPS)]),
        "residual + rms_norm": (weight, _pytorch_after_add, lambda x, weight, residual: rms_norm(x, weight, EPS, residual=residual)),
    }
    for name, (gain, theirs, ours) in kinds.items():
        ways = {way: _step(norm, x, gain, residual, grad) for way, norm in (("F.rms_norm", theirs), ("ours", ours))}
        yield Case(f"{name} forward + backward, {title}", ways)
    passes = _passes(x, weight, residual, grad)
    yield Case(f"norm of {title}", {name: run for name, (run, _) in passes.items()}, {name: moved for name, (_, moved) in passes.items()})


def _pytorch(x: Tensor, weight: Tensor, residual: Tensor) -> list[Tensor]:
    if weight.numel() == 1:
        return [F.rms_norm(x, x.shape[-1:], None, EPS) * weight]
    return [F.rms_norm(x, x.shape[-1:], weight, EPS)]


def _pytorch_after_add(x: Tensor, weight: Tensor, residual: Tensor) -> list[Tensor]:
    total = x + residual
    return [*_pytorch(total, weight, residual), total]


def _step(norm: Norm, x: Tensor, weight: Tensor, residual: Tensor, grad: Tensor) -> Callable[[], Sequence[Tensor]]:
    """Results and gradients."""
    leaves = [each.detach().requires_grad_() for each in (x, weight, residual)]

    def step() -> list[Tensor]:
        results = norm(*leaves)
        wanted = leaves if len(results) == 2 else leaves[:2]
        return [*(each.detach() for each in results), *torch.autograd.grad(results, wanted, [grad] * len(results))]

    return step


def _passes(x: Tensor, weight: Tensor, residual: Tensor, grad: Tensor) -> dict[str, tuple[Callable[[], Sequence[Tensor]], float]]:
    """Single kernels, and the bytes that each moves at least."""
    amax, size = torch.tensor(6.0, device=x.device), float(x.nbytes)
    quantized = x.nbytes + x.numel()
    return {
        COPY: copy(x),
        "F.rms_norm, forward": (lambda: _pytorch(x, weight, residual), 2 * size),
        "forward": (lambda: [rms_norm(x, weight, EPS)], 2 * size),
        "forward, one gain": (lambda: [rms_norm(x, weight[:1], EPS)], 2 * size),
        "forward with residual": (lambda: rms_norm(x, weight, EPS, residual=residual), 4 * size),
        "backward": (_backward(x, weight, grad), 3 * size),
        "backward, one gain": (_backward(x, weight[:1], grad), 3 * size),
        "forward to FP8 1x128": (lambda: [rms_norm_quantize(x, weight, EPS).codes], quantized),
        "forward to NVFP4": (lambda: [rms_norm_quantize(x, weight, EPS, format="nvfp4", amax=amax).codes], x.nbytes + x.numel() * 9 / 16),
    }


def _backward(x: Tensor, weight: Tensor, grad: Tensor) -> Callable[[], Sequence[Tensor]]:
    leaves = [each.detach().requires_grad_() for each in (x, weight)]
    y = rms_norm(*leaves, EPS)
    return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)
