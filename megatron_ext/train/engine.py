"""One optimizer step, or one evaluation, by packs, whichever of DeepSpeed's engines is underneath."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_ext.model.gpt import GPT
from megatron_ext.optim.sharded import ShardedOptimizer
from megatron_ext.parallel.grid import Grid
from megatron_ext.planning import Pack, Plan
from megatron_ext.train.losses import LossSums
from megatron_ext.train.packs import Packs
from megatron_ext.train.passes import WholePasses
from megatron_ext.train.pipeline_passes import PipelinePasses


@dataclass(frozen=True)
class StepResult:
    """What one step of all ranks did. Losses are sums in nats, by number of source, float64 [sources]."""

    loss_sums: torch.Tensor
    loss_tokens: torch.Tensor
    grad_norm: float
    skipped: bool
    flags: torch.Tensor
    """What the ranks passed as ``flags``, summed."""

    @property
    def loss(self) -> float:
        """Mean loss of all tokens of the step that have a label, in nats."""
        return float(self.loss_sums.sum() / self.loss_tokens.sum().clamp(min=1.0))


class Passes(Protocol):
    """Forward and backward of packs through the layers of this rank, on an engine of DeepSpeed."""

    in_step: bool
    """Every data rank must be given the same number of packs, at least one."""

    def train(self, packs: Packs, denominator: float, losses: LossSums) -> None:
        """Accumulate the gradients of the sum of losses over ``denominator``, then take the optimizer's step."""

    def evaluate(self, packs: Packs, losses: LossSums) -> None:
        """Compute the losses only."""

    def close(self) -> None:
        """Release what DeepSpeed holds."""


class Engine:
    """Trains a model by packs.

    Args:
        model: this rank's part of the model.
        optimizer: on its parameters.
        grid: the ranks.
        deepspeed_config: for ``deepspeed.initialize``.
        num_sources: number of sources that losses are told apart by.
    """

    def __init__(self, model: GPT, optimizer: ShardedOptimizer, grid: Grid, deepspeed_config: dict[str, Any], num_sources: int) -> None:
        passes = PipelinePasses if grid.shape.pp > 1 else WholePasses
        self._passes: Passes = passes(model, optimizer, grid, deepspeed_config)
        self._weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._optimizer = optimizer
        self.grid = grid
        self._num_sources = num_sources

    def packs_of(self, plan: Plan) -> list[Pack]:
        """What this rank computes of a plan."""
        return plan.rounds_of(self.grid.dp.rank, at_least=1) if self._passes.in_step else plan.packs_of(self.grid.dp.rank)

    def step(self, packs: Packs, step_loss_tokens: int, flags: torch.Tensor) -> StepResult:
        """Accumulate the gradients of ``packs`` and update.

        Args:
            packs: of this rank, as ``packs_of`` says.
            step_loss_tokens: labelled tokens of the whole step over all ranks: the denominator of the loss.
            flags: float64 [n]: small values to be summed over the ranks on the way.
        """
        losses = LossSums(self._num_sources)
        self._optimizer.expect_backwards(len(packs))
        self._passes.train(packs, float(max(1, step_loss_tokens)), losses)
        sums, flags = losses.over(self.grid, flags)
        return StepResult(sums[0], sums[1], self._optimizer.grad_norm, self._optimizer.overflow, flags)

    def evaluate(self, packs: Packs) -> tuple[float, float]:
        """Sum of the losses in nats of the packs of all ranks, and the number of their labelled tokens. ``packs`` as in ``step``."""
        losses = LossSums(self._num_sources)
        self._passes.evaluate(packs, losses)
        sums, _ = losses.over(self.grid, torch.zeros(0, dtype=torch.float64))
        loss, tokens = sums.sum(1).tolist()
        return loss, tokens

    def weight(self, name: str) -> torch.Tensor:
        """This rank's part of a parameter, in the dtype of the model."""
        return self._weights[name]

    def close(self) -> None:
        """Release what DeepSpeed holds."""
        self._passes.close()
