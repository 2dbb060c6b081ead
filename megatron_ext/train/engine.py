"""One optimizer step on DeepSpeed's engine: forward and backward of this rank's packs, then the owner optimizer.

Read from deepspeed 0.19.8: with ``managed_gradient_accumulation`` off, ``backward`` only accumulates and ``step`` is the caller's
boundary; the all-reduce of gradients at that boundary is switched off by ``enable_backward_allreduce``, because the optimizer reduces
each gradient to its owner. On a CPU, DeepSpeed would compile a shared-memory collective at start, for minutes and with a compiler that
a user need not have; ``deepspeed.ops.__compatible_ops__`` says no to it. No other internal of DeepSpeed is touched.
"""

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.utils import logger as deepspeed_logger

from megatron_ext.data.batch import PackedBatch
from megatron_ext.optim.sharded import ShardedOptimizer
from megatron_ext.parallel.device import collective_backend
from megatron_ext.parallel.world import World


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


class Engine:
    """Trains a model by packs.

    Args:
        model: takes ``PackedBatch.model_inputs``, returns (sum of weighted token losses, token losses).
        optimizer: on the model's parameters.
        world: the data ranks.
        deepspeed_config: for ``deepspeed.initialize``.
        num_sources: number of sources that losses are told apart by.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: ShardedOptimizer, world: World, deepspeed_config: dict[str, Any], num_sources: int
    ) -> None:
        _join_deepspeed(world)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config, dist_init_required=False)
        self._engine.enable_backward_allreduce = False
        self._optimizer = optimizer
        self._world = world
        self._num_sources = num_sources

    def step(self, packs: Iterable[PackedBatch], step_loss_tokens: int, flags: torch.Tensor) -> StepResult:
        """Accumulate the gradients of ``packs`` and update.

        Args:
            packs: of this rank; their number may differ between ranks and may be 0.
            step_loss_tokens: labelled tokens of the whole step over all ranks: the denominator of the loss.
            flags: float64 [n]: small values to be summed over the ranks on the way.
        """
        sums = torch.zeros(2, self._num_sources, dtype=torch.float64)
        for pack in packs:
            batch = pack.to(self._world.device)
            loss_sum, token_loss = self._engine(*batch.model_inputs)
            self._engine.backward(loss_sum / max(1, step_loss_tokens), scale_wrt_gas=False)
            sums += losses_by_source(batch, token_loss, self._num_sources)
        self._engine.step()
        total = self._world.sum(torch.cat([sums.flatten(), flags]))
        by_source = total[: sums.numel()].view_as(sums)
        return StepResult(by_source[0], by_source[1], self._optimizer.grad_norm, self._optimizer.overflow, total[sums.numel() :])

    def write_monitors(self, events: list[tuple[str, float, int]]) -> None:
        """Send (name, value, step) to the monitors that the DeepSpeed configuration enables."""
        if self._engine.monitor.enabled:
            self._engine.monitor.write_events(events)

    def close(self) -> None:
        """Release what DeepSpeed holds."""
        self._engine.destroy()


def _join_deepspeed(world: World) -> None:
    """Let DeepSpeed use the process group that exists."""
    deepspeed_logger.setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", str(world.device.index or 0))
    deepspeed.init_distributed(collective_backend(world.device), auto_mpi_discovery=False, verbose=False)


def losses_by_source(batch: PackedBatch, token_loss: torch.Tensor, num_sources: int) -> torch.Tensor:
    """Sum of token losses and number of labelled tokens of each source, float64 [2, sources] on the CPU."""
    weight = batch.loss_weight.double()
    sums = torch.zeros(2, num_sources, dtype=torch.float64, device=weight.device)
    sums[0].index_add_(0, batch.sources, token_loss.double() * weight)
    sums[1].index_add_(0, batch.sources, weight)
    return sums.cpu()
