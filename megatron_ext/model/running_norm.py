"""Norms by statistics over tokens instead of channels: PowerNorm and Unified Normalization.

**Their training statistics cross tokens.** What a token gives depends on all tokens of the steps before, those of other documents and of
other data ranks among them, and gradients are corrected by sums over tokens. So a change of one document reaches the others, one step
later; inside a step documents stay apart, and results do not depend on how its tokens are spread over packs and ranks.

A step normalises by the statistics of the steps before it, which are parameters that no gradient changes (``running_*``, float32 in the
master weights like all others): so they are saved, divided and sent as parameters are. The sums of the step itself are taken in backward,
once for each pack even where activations are computed again, and ``RunningNormUpdate`` adds them up over all ranks when the step ends.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_ext.kernels.norm import rms_norm
from megatron_ext.model.norm import Norm

RUNNING = ("running_square", "running_product", "running_steps")
"""Names of the parameters that are statistics."""


class RunningNorm(Norm):
    """Channel by channel x / sqrt(s + eps), times a learned gain, with s from the mean squares of earlier steps.

    x is first divided by the root mean square of its own channels (the grouped scaling of PowerNorm's released code, with one group).
    Without that a stack of such norms cannot begin: s lags a step behind, and what one layer corrects is multiplied by what the next does.

    The gradient g of what is normalised is corrected to g - p x / sqrt(s + eps), with p from the means of g x / sqrt(s + eps) of earlier
    steps, as if s were of this step and differentiated. Arguments as of ``Norm``.
    """

    window = 1
    """Values of each channel that ``running_square`` and ``running_product`` keep, one row of all channels after another."""

    def __init__(self, size: int, eps: float, partial: bool = False, factor: float = 1.0) -> None:
        super().__init__(size, eps, partial, factor)
        self.running_square = nn.Parameter(torch.ones(self.window * size))
        self.running_product = nn.Parameter(torch.zeros(self.window * size))
        self.running_steps = nn.Parameter(torch.zeros(1))
        self._sums: Tensor | None = None

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """Normalise ``x`` [T, size]. ``present`` bool [T]: which rows are tokens; None: all. Others get no gradient and count nowhere."""
        x = rms_norm(x, x.new_ones(1), self.eps, backend="torch")
        return _Normalize.apply(x, self.gain, self.running_square, self.running_product, self.running_steps, present, self)

    @abstractmethod
    def statistics(self) -> tuple[Tensor, Tensor]:
        """s and p [size], at least float32, from the ``running_*`` parameters."""

    @abstractmethod
    def updated(self, name: str, old: Tensor, rows: slice, means: "StepMeans") -> Tensor:
        """New values of rows ``rows`` of the parameter ``name``, of ``RUNNING``, whose values there are ``old``."""

    def add(self, squares: Tensor, products: Tensor, tokens: Tensor) -> None:
        """Count sums over tokens: of squares and of products [size], and how many tokens []."""
        sums = torch.cat([squares, products, tokens[None]])
        self._sums = sums if self._sums is None else self._sums + sums

    def take_sums(self) -> Tensor:
        """What was added since the last call, one after another: [2 size + 1]."""
        sums, self._sums = self._sums, None
        return self.wide(self.running_square.new_zeros(2 * self.size + 1)) if sums is None else sums

    @staticmethod
    def wide(tensor: Tensor) -> Tensor:
        """In at least float32, without gradient."""
        return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


class StepMeans:
    """Means over the tokens of a step, beside the statistics that it was computed with.

    Args:
        norm: whose step it is, before any of its parameters changes.
        sums: as ``take_sums`` gives them, of all ranks; of at least one token.
    """

    def __init__(self, norm: RunningNorm, sums: Tensor) -> None:
        self.square, self.product = (sums[:-1] / sums[-1]).split(norm.size)
        self.old_square = norm.statistics()[0].clone()
        self.steps = norm.wide(norm.running_steps).clone()


class PowerNorm(RunningNorm):
    """Shen et al. 2020, arXiv:2003.07845, algorithm 2, without its shift.

    Statistics are exponential means with factor 0.9, and plain means over the first steps, so that they begin where the data are.
    """

    momentum = 0.9
    last_step = 16
    """Where the count of steps ends, because the mean has long been exponential; small enough for bfloat16."""

    def statistics(self) -> tuple[Tensor, Tensor]:
        """See ``RunningNorm``."""
        return self.wide(self.running_square), self.wide(self.running_product)

    def updated(self, name: str, old: Tensor, rows: slice, means: StepMeans) -> Tensor:
        """See ``RunningNorm``."""
        if name == "running_steps":
            return (old + 1).clamp(max=self.last_step)
        kept = (means.steps / (means.steps + 1)).clamp(max=self.momentum)
        if name == "running_square":
            return kept * old + (1 - kept) * means.square[rows]
        normalized = means.square[rows] / (means.old_square[rows] + self.eps)
        return old * (1 - (1 - kept) * normalized) + (1 - kept) * means.product[rows]


class UnifiedNorm(RunningNorm):
    """After Yang et al. 2022, arXiv:2208.01313, section 3: geometric means of squares and arithmetic means of products over four steps.

    Where the arithmetic mean of the squares exceeds the geometric one by more than ``window`` times that, a step was an outlier, and the
    last step alone counts. The paper's window ends with the step itself; here it ends with the step before (see the module).
    """

    window = 4

    def statistics(self) -> tuple[Tensor, Tensor]:
        """See ``RunningNorm``."""
        squares, products = (self.wide(p).view(self.window, self.size) for p in (self.running_square, self.running_product))
        steps = self.wide(self.running_steps)
        seen = (torch.arange(self.window, device=steps.device) < steps)[:, None]
        count = steps.clamp(1, self.window)
        arithmetic, product = ((each * seen).sum(0) / count for each in (squares, products))
        geometric = ((squares.clamp_min(torch.finfo(squares.dtype).tiny).log() * seen).sum(0) / count).exp()
        last = squares[((steps - 1) % self.window).long()].squeeze(0)
        return torch.where(arithmetic - geometric > self.window * geometric, last, geometric), product

    def updated(self, name: str, old: Tensor, rows: slice, means: StepMeans) -> Tensor:
        """See ``RunningNorm``. The count of steps goes round between ``window`` and twice that: it says which row is the oldest."""
        if name == "running_steps":
            return torch.where(old + 1 < 2 * self.window, old + 1, self.window)
        places = torch.arange(rows.start, rows.stop, device=old.device)
        new = (means.square if name == "running_square" else means.product)[places % self.size]
        return torch.where(places // self.size == means.steps % self.window, new.to(old.dtype), old)


class _Normalize(torch.autograd.Function):
    """Statistics get gradients of zero, so that every parameter has one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, square: Tensor, product: Tensor, steps: Tensor, present: Tensor | None, norm: RunningNorm
    ) -> Tensor:
        s, p = norm.statistics()
        scale = torch.rsqrt(s + norm.eps)
        ctx.norm = norm
        ctx.save_for_backward(x, gain, scale, p, present)
        return (x.to(scale.dtype) * scale).to(x.dtype) * gain

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, scale, p, present = ctx.saved_tensors
        wide_x, wide_grad = x.to(scale.dtype), grad.to(scale.dtype)
        if present is not None:
            wide_x, wide_grad = wide_x * present[:, None], wide_grad * present[:, None]
        normalized = wide_x * scale
        by_gain = (wide_grad * normalized).sum(0)
        tokens = scale.new_tensor(len(x)) if present is None else present.sum().to(scale.dtype)
        ctx.norm.add(wide_x.square().sum(0), by_gain * gain.to(scale.dtype), tokens)
        grad_x = (wide_grad * gain.to(scale.dtype) - p * normalized) * scale
        zeros = [torch.zeros_like(each) for each in (ctx.norm.running_square, ctx.norm.running_product, ctx.norm.running_steps)]
        return grad_x.to(x.dtype), by_gain.to(gain.dtype), *zeros, None, None
