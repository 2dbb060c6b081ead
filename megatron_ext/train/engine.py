"""One optimizer step, or one evaluation, by packs, whichever of DeepSpeed's engines is underneath."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_ext.checkpoint.save import SavedOptimizer
from megatron_ext.model.gpt import GPT
from megatron_ext.optim.options import OptimizerOptions
from megatron_ext.optim.sharded import ShardedOptimizer
from megatron_ext.parallel.grid import Grid
from megatron_ext.planning import Pack, Plan
from megatron_ext.train.distillation import Distillation
from megatron_ext.train.losses import LossSums
from megatron_ext.train.packs import Packs
from megatron_ext.train.passes import WholePasses
from megatron_ext.train.pipeline_passes import PipelinePasses
from megatron_ext.train.update_gate import Judge, UpdateGate, both_finite, mean_loss
from megatron_ext.train.zero import ZeroPasses


@dataclass(frozen=True)
class StepResult:
    """What one step of all ranks did. Losses are sums in nats, by number of source, float64 [sources]."""

    loss_sums: torch.Tensor
    loss_tokens: torch.Tensor
    """Sums of the weights of the losses: their numbers where weights are 1."""
    grad_norm: float
    skipped: bool
    flags: torch.Tensor
    """What the ranks passed as ``flags``, summed."""
    orthogonalizations: int
    """Matrices that all ranks together orthogonalized; what several ranks hold alike counts for each of them."""
    exchange_seconds: float
    """Mean over the ranks of the time in exchanges of shared packs; see ``Traffic``."""
    work_seconds: list[float]
    """Of each rank, in reading and computing its packs, without waiting for others; see ``Activity``."""

    @property
    def loss(self) -> float:
        """Mean loss of all tokens of the step that have a label, in nats; with weights, the weighted mean."""
        return mean_loss(self.loss_sums, self.loss_tokens)


class Passes(Protocol):
    """Forward and backward of packs through the layers of this rank, on an engine of DeepSpeed."""

    in_rounds: bool
    """Data ranks wait for each other between packs: plans must be in rounds, of at least one."""

    pack_seconds: float
    """Seconds from the first pack of the last step to the end of the last one; of a pipeline, with the update."""

    def train(self, packs: Packs, denominator: float, losses: LossSums) -> None:
        """Accumulate the gradients of the sum of losses over ``denominator``, then take the optimizer's step."""

    def evaluate(self, packs: Packs, losses: LossSums) -> None:
        """Compute the losses only."""

    def weight(self, name: str) -> torch.Tensor:
        """This rank's part of a parameter."""

    def close(self) -> None:
        """Release what DeepSpeed holds."""


class StepOptimizer(SavedOptimizer, Protocol):
    """An optimizer as the trainer sees it; ``ShardedOptimizer`` is one, and says what the members are."""

    gate: Callable[[float], bool]
    grad_norm: float
    overflow: bool
    updates: int

    def expect_backwards(self, count: int) -> None: ...

    orthogonalizations: int

    def set_learning_rate_factor(self, factor: float) -> None: ...

    def check_replicas(self) -> None: ...

    def records(self) -> dict[str, Any]: ...


class Engine:
    """Trains a model by packs.

    Args:
        passes: the engine of DeepSpeed underneath.
        optimizer: whose step the passes take.
        grid: the ranks.
        num_sources: number of sources that losses are told apart by.
    """

    def __init__(self, passes: Passes, optimizer: StepOptimizer, grid: Grid, num_sources: int) -> None:
        self._passes = passes
        self.optimizer = optimizer
        self.grid = grid
        self._num_sources = num_sources

    @property
    def in_rounds(self) -> bool:
        """Plans must be in rounds, of at least one."""
        return self._passes.in_rounds

    def packs_of(self, plan: Plan) -> list[Pack]:
        """What this rank computes of a plan. All ranks ask for the same plan: groups that its packs need are made now."""
        for degree in sorted({pack.degree // pack.ring for pack in plan.packs}):
            self.grid.block(degree)
        for degree, ring in sorted({(pack.degree, pack.ring) for pack in plan.packs if pack.ring > 1}):
            self.grid.ring(degree, ring)
        return plan.packs_of(self.grid.dp.rank)

    def step(self, packs: Packs, loss_weight: float, flags: torch.Tensor, judge: Judge = both_finite) -> StepResult:
        """Accumulate the gradients of ``packs`` and update.

        Args:
            packs: of this rank, as ``packs_of`` says.
            loss_weight: sum of the weights of the losses of the whole step over all ranks: the denominator of the loss. Where all are 1,
                the number of labelled tokens.
            flags: float64 [n]: small values to be summed over the ranks on the way.
            judge: decides, before the update, whether it is taken.
        """
        losses = LossSums(self._num_sources)
        before = self.grid.traffic.exchange_seconds
        gate = self.optimizer.gate = UpdateGate(losses, self.grid, judge)
        self.optimizer.expect_backwards(len(packs))
        self._passes.train(packs, float(loss_weight) or 1.0, losses)
        exchange_seconds = self.grid.traffic.exchange_seconds - before
        mine = torch.tensor([self.optimizer.orthogonalizations, exchange_seconds], dtype=torch.float64)
        work = torch.zeros(self.grid.shape.size, dtype=torch.float64)
        work[self.grid.world.rank] = self.grid.world.activity.work_seconds()
        self.grid.world.activity.begin("exchange")
        beside = self.grid.world.sum(torch.cat([work, flags, mine]))
        *work_seconds, orthogonalizations, exchange_seconds = torch.cat([beside[: len(work)], beside[-2:]]).tolist()
        return StepResult(
            *gate.sums,
            self.optimizer.grad_norm,
            self.optimizer.overflow,
            beside[len(work) : -2],
            int(orthogonalizations),
            exchange_seconds / self.grid.shape.size,
            work_seconds,
        )

    @property
    def pack_seconds(self) -> float:
        """Seconds from the first pack of the last step to the end of the last one on this rank."""
        return self._passes.pack_seconds

    def evaluate(self, packs: Packs, losses: LossSums) -> torch.Tensor:
        """Evaluate ``packs``, as in ``step``, into ``losses``; returns its values summed over all ranks, float64."""
        self._passes.evaluate(packs, losses)
        sums, _ = losses.over(self.grid, torch.zeros(0, dtype=torch.float64))
        return sums

    def weight(self, name: str) -> torch.Tensor:
        """This rank's part of a parameter, in the dtype of the model. All data ranks ask for the same ones in turn."""
        return self._passes.weight(name)

    def close(self) -> None:
        """Release what DeepSpeed holds."""
        self._passes.close()


def owner_engine(
    model: GPT,
    optimizer: ShardedOptimizer,
    grid: Grid,
    deepspeed_config: dict[str, Any],
    num_sources: int,
    distillation: Distillation | None = None,
) -> Engine:
    """An engine whose optimizer owns whole rows or tensors; the other arguments as of ``Engine`` and ``deepspeed.initialize``.

    ``distillation``: of ``model``, which is told of every pack.
    """
    passes = PipelinePasses if grid.shape.pp > 1 else WholePasses
    return Engine(passes(model, optimizer, grid, deepspeed_config, distillation), optimizer, grid, num_sources)


def zero_engine(
    model: GPT,
    options: OptimizerOptions,
    grid: Grid,
    deepspeed_config: dict[str, Any],
    num_sources: int,
    distillation: Distillation | None = None,
) -> Engine:
    """An engine with AdamW under DeepSpeed's ZeRO, of the stage that ``options`` say; ``distillation`` as in ``owner_engine``."""
    passes = ZeroPasses(model, options, grid, deepspeed_config, distillation)
    return Engine(passes, passes.optimizer, grid, num_sources)
