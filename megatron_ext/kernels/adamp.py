"""AdamP's step (Heo et al., ICLR 2021, arXiv:2006.08217, algorithm 2) in three parts, so that sums of shards can be added in between.

  a. ``adamp_moments`` updates the moments of what is here of each matrix and returns the sums of its rows
  b. ``projection.summarize`` and ``projection.project`` decide what is projected; that module says what has to be reduced over what
  c. ``adamp_update`` changes the parameters as decided

``adamp_step`` is all of it, for whole tensors. The C++ backend moves 40 bytes a value, where AdamW moves 28: a reads p, g, m, v and writes
m, v; c reads p, m, v and writes p.
"""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.build import load_library
from megatron_ext.kernels.projection import Projection, as_rows, matrices, project, row_sums, summarize

Backend = Literal["torch", "cpu"]


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

    Backend ``torch`` is the definition, for any device and dtype. ``cpu`` (csrc/cpu/adamp.cpp) takes contiguous float32 tensors on the CPU,
    and raises ConfigError for others and KernelBuildError where it cannot be built; its results do not depend on ``threads``.
    """
    lists = [list(parameters), list(gradients), list(exp_avgs), list(exp_avg_sqs)]
    if backend == "cpu":
        return _moments_cpu(*_checked(lists), *adam.betas, adam.eps, adam.corrections[1], adam.nesterov, threads, "")
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
    lists = [list(parameters), list(gradients), list(exp_avgs), list(exp_avg_sqs)]
    if backend == "cpu":
        numbers = (*adam.betas, adam.eps, adam.corrections[1], adam.nesterov, threads, "")
        _update_cpu(*_checked(lists), *numbers, coefficients, decays, step_size)
        return
    of_tensors = coefficients.split([len(as_rows(p)) for p in parameters])
    for p, u, coefficient, decay in zip(parameters, adam.of_moments(*lists[1:]), of_tensors, decays.unbind(), strict=True):
        direction = as_rows(u) - as_rows(p) * coefficient.to(p.dtype)[:, None]
        p.mul_(decay.to(p.dtype)).sub_(direction.view_as(p), alpha=step_size)


def _checked(lists: list[list[Tensor]]) -> list[list[Tensor]]:
    """The tensors as the C interface takes them. Gradients may have any strides; what is written may not."""
    lists[1] = [gradient.contiguous() for gradient in lists[1]]
    for tensor in (tensor for tensors in lists for tensor in tensors):
        if tensor.device.type != "cpu" or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            seen = f"{list(tensor.shape)} {tensor.dtype} on {tensor.device} with strides {list(tensor.stride())}"
            raise ConfigError(f"fused AdamP takes contiguous float32 tensors on the CPU, not {seen}; without fused=True any will do")
    return lists


@torch.library.custom_op("megatron_ext::adamp_moments", mutates_args=("m", "v"), device_types="cpu")
def _moments_cpu(
    p: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor],
    beta1: float, beta2: float, eps: float, correction: float, nesterov: bool, threads: int, instructions: str,
) -> Tensor:  # fmt: skip
    """Part a in C++. ``instructions``: "avx512", "avx2", "portable", or "" for the first of these that the CPU has."""
    sums = torch.empty(sum(len(as_rows(t)) for t in p), 4, dtype=torch.float64)
    _call("adamp_moments_f32", (p, g, m, v), (beta1, beta2, eps, correction), nesterov, threads, instructions, sums)
    return sums


@torch.library.custom_op("megatron_ext::adamp_update", mutates_args=("p",), device_types="cpu")
def _update_cpu(
    p: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor],
    beta1: float, beta2: float, eps: float, correction: float, nesterov: bool, threads: int, instructions: str,
    coefficients: Tensor, decays: Tensor, step_size: float,
) -> None:  # fmt: skip
    """Part c in C++."""
    extra = (coefficients.contiguous(), decays.contiguous(), step_size)
    _call("adamp_update_f32", (p, g, m, v), (beta1, beta2, eps, correction), nesterov, threads, instructions, *extra)


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
    """One AdamP step on whole tensors, in place. Backend ``cpu``: see ``adamp_moments``. Returns what was projected."""
    tensors = (parameters, gradients, exp_avgs, exp_avg_sqs)
    here = matrices(tuple(p.shape for p in parameters), delta, parameters[0].device)
    sums = adamp_moments(*tensors, adam, backend=backend, threads=threads)
    projection = project(sums, summarize(sums, here, adam.eps), here, adam.eps)
    decays = projection.decays(lr, weight_decay, wd_ratio)
    step_size = lr / adam.corrections[0]
    adamp_update(*tensors, adam, projection.coefficients, decays, step_size, backend=backend, threads=threads)
    return projection
