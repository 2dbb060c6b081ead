"""AdamP's step (Heo et al., ICLR 2021, arXiv:2006.08217, algorithm 2) in three parts, so that sums of shards can be added in between.

  a. ``adamp_moments`` updates the moments of what is here of each matrix and returns the sums of its rows
  b. ``projection.summarize`` and ``projection.project`` decide what is projected; that module says what has to be reduced over what
  c. ``adamp_update`` changes the parameters as decided

That moves 40 bytes a value where AdamW moves 28: a reads p, g, m, v and writes m, v; c reads p, m, v and writes p. Most matrices are not
projected in most steps, so there is a way that costs them no more than AdamW: ``adamp_speculate`` instead of a also changes the
parameters, as if nothing was projected, and ``adamp_correct`` instead of c treats only what is projected: 28 bytes a value, or 44.

``adamp_step`` is all of it, for whole tensors. A kernel has two passes, csrc/cpu/adamp.cpp and csrc/triton/adamp.py; the plain PyTorch here
is their definition.
"""

import ctypes
import importlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.build import load_library
from megatron_ext.kernels.projection import Projection, as_rows, matrices, project, row_sums, summarize

Backend = Literal["torch", "cpu", "triton"]


@dataclass(frozen=True)
class AdamUpdate:
    """u = m / (sqrt(v) / sqrt(1 - beta2^steps) + eps), m replaced by beta1 m + (1 - beta1) g with ``nesterov``; ``steps`` counts from 1."""

    steps: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    nesterov: bool = False

    @property
    def corrections(self) -> tuple[float, float]:
        """1 - beta1^steps and 1 - beta2^steps."""
        return 1 - self.betas[0] ** self.steps, 1 - self.betas[1] ** self.steps

    def change_moments(self, gradients: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor]) -> None:
        """m <- beta1 m + (1 - beta1) g and v <- beta2 v + (1 - beta2) g^2, in place."""
        beta1, beta2 = self.betas
        torch._foreach_mul_(exp_avgs, beta1)
        torch._foreach_add_(exp_avgs, gradients, alpha=1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, value=1 - beta2)

    def of_moments(self, gradients: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor]) -> list[Tensor]:
        """u of each tensor, before the division by 1 - beta1^steps."""
        beta1 = self.betas[0]
        denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_div_(denominators, math.sqrt(self.corrections[1]))
        torch._foreach_add_(denominators, self.eps)
        if self.nesterov:
            exp_avgs = torch._foreach_mul(exp_avgs, beta1)
            torch._foreach_add_(exp_avgs, torch._foreach_mul(gradients, 1 - beta1))
        return torch._foreach_div(exp_avgs, denominators)


def adamp_moments(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    adam: AdamUpdate,
    *,
    backend: Backend = "torch",
    threads: int = 1,
) -> Tensor:
    """Part a: change the moments in place; returns the row sums [all rows, 4] float64 of all tensors, one after another.

    Backend ``torch`` is the definition, for any device and dtype. ``cpu`` (C++) and ``triton`` (CUDA, or Triton's interpreter) take
    contiguous float32 tensors there. Results of ``cpu`` do not depend on ``threads``, which the others ignore; ``triton`` does not wait
    for the device.

    Raises:
        ConfigError: an unknown backend, or one that cannot take these tensors or run here.
        KernelBuildError: ``cpu`` cannot be built.
    """
    lists = (parameters, gradients, exp_avgs, exp_avg_sqs)
    if backend != "torch":
        return _first_pass(lists, adam, 0.0, 0.0, backend, threads)
    adam.change_moments(*lists[1:])
    return torch.cat([row_sums(*tensors) for tensors in zip(parameters, gradients, adam.of_moments(*lists[1:]), strict=True)])


def adamp_update(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    adam: AdamUpdate,
    coefficients: Tensor,
    decays: Tensor,
    step_size: float,
    *,
    backend: Backend = "torch",
    threads: int = 1,
) -> None:
    """Part c: p <- p decay - step_size (u - coefficient p) in place, with u from the moments that part a left.

    ``coefficients`` [all rows] and ``decays`` [tensors] float64; backends as in ``adamp_moments``.
    """
    lists = (parameters, gradients, exp_avgs, exp_avg_sqs)
    if backend != "torch":
        growth = _of_rows(decays, parameters, len(coefficients)) - 1 + step_size * coefficients
        _second_pass(lists, adam, growth, torch.full_like(growth, -step_size), backend, threads)
        return
    of_tensors = coefficients.split([len(as_rows(p)) for p in parameters])
    for p, u, coefficient, decay in zip(parameters, adam.of_moments(*lists[1:]), of_tensors, decays.unbind(), strict=True):
        direction = as_rows(u) - as_rows(p) * coefficient.to(p.dtype)[:, None]
        p.mul_(decay.to(p.dtype)).sub_(direction.view_as(p), alpha=step_size)


def adamp_speculate(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    adam: AdamUpdate,
    *,
    lr: float,
    weight_decay: float = 0.0,
    backend: Backend = "cpu",
    threads: int = 1,
) -> Tensor:
    """``adamp_moments`` and the update of an unprojected step, which is AdamW's. Returns the sums from before the update.

    Raises:
        ConfigError: as ``adamp_moments``; backend ``torch``, which has no passes to save; or not ``can_speculate``.
    """
    if not can_speculate(lr, weight_decay):
        raise ConfigError(f"lr weight_decay is {lr * weight_decay}, of which AdamP cannot correct the update; accepted is at most 0.5")
    lists = (parameters, gradients, exp_avgs, exp_avg_sqs)
    # The same float64 numbers as in ``adamp_update``, so that what is not projected gets the same bits.
    return _first_pass(lists, adam, (1 - lr * weight_decay) - 1, -(lr / adam.corrections[0]), backend, threads)


def adamp_correct(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    adam: AdamUpdate,
    projection: Projection,
    *,
    lr: float,
    weight_decay: float = 0.0,
    wd_ratio: float = 0.1,
    backend: Backend = "cpu",
    threads: int = 1,
) -> None:
    """Make of what ``adamp_speculate`` left what ``adamp_update`` would have made; exact but for one more rounding of what is projected.

    With w = p kept - s u, where kept = 1 - lr weight_decay: p (decay + s coefficient) - s u is w + e (w + s u), where
    e = (decay + s coefficient) / kept - 1.
    """
    # On a CPU a look at the decision is free.
    if backend == "cpu" and not bool((projection.channel | projection.layer).any()):
        return
    step_size, kept = lr / adam.corrections[0], 1 - lr * weight_decay
    decays = _of_rows(projection.decays(lr, weight_decay, wd_ratio), parameters, len(projection.coefficients))
    growth = (decays + step_size * projection.coefficients) / kept - 1
    _second_pass((parameters, gradients, exp_avgs, exp_avg_sqs), adam, growth, step_size * growth, backend, threads)


def can_speculate(lr: float, weight_decay: float) -> bool:
    """Whether what decay leaves of parameters still tells what they were."""
    return lr * weight_decay <= 0.5


def _of_rows(of_tensors: Tensor, parameters: Sequence[Tensor], rows: int) -> Tensor:
    """[tensors] to [all rows]."""
    here = matrices(tuple(p.shape for p in parameters), 0.0, of_tensors.device)
    return of_tensors.repeat_interleave(here.rows, output_size=rows)


def _first_pass(lists: Sequence[Sequence[Tensor]], adam: AdamUpdate, growth: float, slope: float, backend: Backend, threads: int) -> Tensor:
    """New moments, then p <- p + growth p + slope u unless both are 0. Returns the sums from before that."""
    lists = _checked(lists, backend)
    if backend == "cpu":
        return _first_cpu(*lists, *adam.betas, adam.eps, adam.corrections[1], adam.nesterov, threads, "", growth, slope)
    sums = _twin().first_pass(lists, *_for_triton(lists, adam), growth, slope)
    torch.autograd.graph.increment_version([*lists[0], *lists[2], *lists[3]])
    return sums


def _second_pass(
    lists: Sequence[Sequence[Tensor]], adam: AdamUpdate, growth: Tensor, slope: Tensor, backend: Backend, threads: int
) -> None:
    """p <- p + growth p + slope u, with both for each row, float64. Rows of which both are 0 stay unread."""
    lists, changes = _checked(lists, backend), torch.stack([growth, slope], dim=1)
    if backend == "cpu":
        _second_cpu(*lists, *adam.betas, adam.eps, adam.corrections[1], adam.nesterov, threads, "", changes)
        return
    _twin().second_pass(lists, *_for_triton(lists, adam), changes)
    torch.autograd.graph.increment_version(lists[0])


def _checked(lists: Sequence[Sequence[Tensor]], backend: Backend) -> list[list[Tensor]]:
    """The tensors as kernels take them. Gradients may have any strides; what is written may not."""
    if backend not in ("cpu", "triton"):
        raise ConfigError(f"AdamP's kernel is {backend!r}; accepted are cpu, triton")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    device, place = ("cpu", "the CPU") if backend == "cpu" or interpreted else ("cuda", "a CUDA device, or the CPU with TRITON_INTERPRET=1")
    p, gradients, m, v = lists
    lists = [list(p), [gradient.contiguous() for gradient in gradients], list(m), list(v)]
    for tensor in (tensor for tensors in lists for tensor in tensors):
        if tensor.device.type != device or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            seen = f"{list(tensor.shape)} {tensor.dtype} on {tensor.device} with strides {list(tensor.stride())}"
            raise ConfigError(f"fused AdamP takes contiguous float32 tensors on {place}, not {seen}; without fused=True any will do")
    return lists


@cache
def _twin() -> Any:
    # Not at the top: it needs Triton.
    return importlib.import_module("megatron_ext.csrc.triton.adamp")


def _for_triton(lists: Sequence[Sequence[Tensor]], adam: AdamUpdate) -> tuple[Any, ...]:
    shapes = tuple(tuple(as_rows(p).shape) for p in lists[0])
    return shapes, adam.betas, adam.eps, 1 / math.sqrt(adam.corrections[1]), adam.nesterov


@torch.library.custom_op("megatron_ext::adamp_first", mutates_args=("p", "m", "v"), device_types="cpu")
def _first_cpu(
    p: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor],
    beta1: float, beta2: float, eps: float, correction: float, nesterov: bool, threads: int, instructions: str,
    growth: float, slope: float,
) -> Tensor:  # fmt: skip
    """Pass 1 in C++. ``instructions``: "avx512", "avx2", "portable", or "" for the first of these that the CPU has."""
    sums = torch.empty(sum(len(as_rows(t)) for t in p), 4, dtype=torch.float64)
    _call("adamp_first_f32", (p, g, m, v), (beta1, beta2, eps, correction), nesterov, threads, instructions, growth, slope, sums)
    return sums


@torch.library.custom_op("megatron_ext::adamp_second", mutates_args=("p",), device_types="cpu")
def _second_cpu(
    p: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor],
    beta1: float, beta2: float, eps: float, correction: float, nesterov: bool, threads: int, instructions: str,
    changes: Tensor,
) -> None:  # fmt: skip
    """Pass 2 in C++."""
    _call("adamp_second_f32", (p, g, m, v), (beta1, beta2, eps, correction), nesterov, threads, instructions, changes.contiguous())


def _call(
    name: str,
    lists: tuple[list[Tensor], ...],
    numbers: tuple[float, ...],
    nesterov: bool,
    threads: int,
    instructions: str,
    *extra: Tensor | float,
) -> None:
    """Call a function of csrc/cpu/adamp.cpp, whose arguments these are; its error codes become exceptions."""
    count = len(lists[0])
    sizes = list(zip(*(as_rows(p).shape for p in lists[0]), strict=True))
    integers = [ctypes.c_int64(count), *((ctypes.c_int64 * count)(*of_tensors) for of_tensors in sizes)]
    pointers = [(ctypes.c_void_p * count)(*(t.data_ptr() for t in tensors)) for tensors in lists]
    beta1, beta2, eps, correction = numbers
    doubles = [ctypes.c_double(x) for x in (beta1, beta2, eps, math.sqrt(correction))]
    rest = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else ctypes.c_double(x) for x in extra]
    function = getattr(load_library("adamp"), name)
    code = function(
        *integers, *pointers, *doubles, ctypes.c_int32(nesterov), ctypes.c_int64(threads), ctypes.c_char_p(instructions.encode()), *rest
    )
    if code:
        raise {1: MemoryError("no memory for the row sums"), 2: ConfigError(f"this CPU has no {instructions} instructions")}[code]


@torch.no_grad()
def adamp_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    adam: AdamUpdate,
    *,
    lr: float,
    weight_decay: float = 0.0,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    backend: Backend = "torch",
    threads: int = 1,
) -> Projection:
    """One AdamP step on whole tensors, in place. Backends: see ``adamp_moments``; kernels speculate. Returns what was projected."""
    tensors = (parameters, gradients, exp_avgs, exp_avg_sqs)
    speculate = backend != "torch" and can_speculate(lr, weight_decay)
    where: dict[str, Any] = {"backend": backend, "threads": threads}
    here = matrices(tuple(p.shape for p in parameters), delta, parameters[0].device)
    if speculate:
        sums = adamp_speculate(*tensors, adam, lr=lr, weight_decay=weight_decay, **where)
    else:
        sums = adamp_moments(*tensors, adam, **where)
    projection = project(sums, summarize(sums, here, adam.eps), here, adam.eps)
    if speculate:
        adamp_correct(*tensors, adam, projection, lr=lr, weight_decay=weight_decay, wd_ratio=wd_ratio, **where)
    else:
        decays = projection.decays(lr, weight_decay, wd_ratio)
        adamp_update(*tensors, adam, projection.coefficients, decays, lr / adam.corrections[0], **where)
    return projection
