"""Packs through a model that this rank has all layers of, on DeepSpeed's plain engine.

Read from deepspeed 0.19.8: with ``managed_gradient_accumulation`` off, ``backward`` only accumulates and ``step`` is the caller's
boundary; the all-reduce of gradients at that boundary is switched off by ``enable_backward_allreduce``, because the optimizer reduces
each gradient to its owner.
"""

import time
from typing import Any

import deepspeed
import torch

from megatron_ext.model.gpt import GPT
from megatron_ext.optim.sharded import ShardedOptimizer
from megatron_ext.parallel.grid import Grid
from megatron_ext.train.deepspeed_setup import GridForDeepSpeed, join_deepspeed
from megatron_ext.train.distillation import Distillation
from megatron_ext.train.losses import LossSums
from megatron_ext.train.packs import Packs, sharing_of


class WholePasses:
    """See ``Passes``. The arguments are those of ``owner_engine``."""

    in_rounds = False
    pack_seconds = 0.0

    def __init__(
        self,
        model: GPT,
        optimizer: ShardedOptimizer,
        grid: Grid,
        deepspeed_config: dict[str, Any],
        distillation: Distillation | None = None,
    ) -> None:
        join_deepspeed(grid.world)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config, mpu=GridForDeepSpeed(grid), dist_init_required=False
        )
        self._engine.enable_backward_allreduce = False
        self._weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._grid, self._device, self._distillation = grid, grid.world.device, distillation

    def train(self, packs: Packs, denominator: float, losses: LossSums) -> None:
        """See ``Passes``."""
        begin = time.perf_counter()
        self._engine.train()
        activity = self._grid.world.activity
        for pack in activity.packs(packs):
            batch = pack.to(self._device)
            sharing = sharing_of(batch, self._grid)
            if self._distillation is not None and self._distillation.active:
                self._distillation.begin_pack(batch, sharing)
            loss_sum, token_loss = self._engine(*batch.model_inputs, sharing)
            activity.backward()
            self._engine.backward(loss_sum / denominator, scale_wrt_gas=False)
            losses.add(token_loss, batch.loss_weight, batch.sources)
        self.pack_seconds = time.perf_counter() - begin
        activity.begin("optimizer")
        self._engine.step()

    @torch.no_grad()
    def evaluate(self, packs: Packs, losses: LossSums) -> None:
        """See ``Passes``."""
        self._engine.eval()
        for pack in self._grid.world.activity.packs(packs, "evaluate"):
            batch = pack.to(self._device)
            losses.add(self._engine(*batch.model_inputs, sharing_of(batch, self._grid))[1], batch.loss_weight, batch.sources)

    def weight(self, name: str) -> torch.Tensor:
        """See ``Passes``."""
        return self._weights[name]

    def close(self) -> None:
        """See ``Passes``."""
        self._engine.destroy()
