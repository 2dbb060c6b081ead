"""Between the gradients of a step and its update: the loss and the gradient norm of all ranks decide whether it is taken."""

import math
from collections.abc import Callable

import torch

from megatron_ext.parallel.grid import Grid
from megatron_ext.train.losses import LossSums

Judge = Callable[[float, float], bool]
"""Whether a step of this loss and gradient norm is taken; asked once a step on every rank, with the same numbers."""


def both_finite(loss: float, grad_norm: float) -> bool:
    """The judge of steps that nobody else judges."""
    return math.isfinite(loss) and math.isfinite(grad_norm)


def mean_loss(sums: torch.Tensor, weights: torch.Tensor) -> float:
    """Mean of losses by their sums and the sums of their weights, float64 [sources] both; 0 without weight."""
    return float(sums.sum()) / (float(weights.sum()) or 1.0)


class UpdateGate:
    """Asked by the optimizer of every rank, once a step, when the gradient norm of all ranks is known.

    Args:
        losses: of this rank, complete when the gate is asked.
        grid: the ranks.
        judge: decides.

    Attributes:
        sums: losses and weights of all ranks, float64 [2, sources].
    """

    def __init__(self, losses: LossSums, grid: Grid, judge: Judge) -> None:
        self._losses, self._grid, self._judge = losses, grid, judge
        self.sums = losses.values

    def __call__(self, grad_norm: float) -> bool:
        """Whether the update is taken."""
        self.sums, _ = self._losses.over(self._grid, torch.zeros(0, dtype=torch.float64))
        return self._judge(mean_loss(*self.sums), grad_norm)
