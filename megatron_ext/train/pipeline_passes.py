"""Packs through the stages of a pipeline, on DeepSpeed's 1F1B schedule.

Read from deepspeed 0.19.8, and relied upon:

- One layer a stage is handed to ``PipelineModule``, so that the division is ours; the engine's ``micro_batches`` may be set before a step.
- Only hidden states travel. Every stage reads the pack from its own copy of the plan, in the order of the schedule, and so needs
  nothing else from the stage before. A pack without tokens passes through; a step without packs does not.
- ``pipeline_enable_backward_allreduce`` off and no tied layers: all gradients, those of tied embeddings too, are the optimizer's.
- Its activation checkpointing stays off: the blocks have their own.
- A schedule is a list of instructions, each carried out by the method that ``_INSTRUCTION_MAP`` has for it: there the phase is known.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron_ext.data.batch import PackedBatch
from megatron_ext.model.gpt import GPT
from megatron_ext.optim.sharded import ShardedOptimizer
from megatron_ext.parallel.grid import Grid
from megatron_ext.parallel.sequence import Sharing
from megatron_ext.train.deepspeed_setup import join_deepspeed, silenced
from megatron_ext.train.distillation import Distillation
from megatron_ext.train.losses import LossSums
from megatron_ext.train.packs import Packs, sharing_of

PHASES = MappingProxyType(
    {
        schedule.LoadMicroBatch: "data",
        schedule.ForwardPass: "forward",
        schedule.BackwardPass: "backward",
        schedule.OptimizerStep: "optimizer",
    }
)
"""Of the instructions of a schedule; in the others stages exchange what they have computed."""


class PackFeed:
    """The packs of a step, in order, for DeepSpeed's loader and for the stage that computes them.

    Args:
        packs: of this rank.
        device: where they are computed.
    """

    def __init__(self, packs: Packs, device: torch.device) -> None:
        self._packs = iter(packs)
        self._device = device
        self._loaded: deque[PackedBatch] = deque()

    def __iter__(self) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor, Tensor]]]:
        return self

    def __next__(self) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """(input of the first stage, labels for the loss): DeepSpeed loads a pack on the first and the last stage only."""
        pack = next(self._packs).to(self._device)
        self._loaded.append(pack)
        return pack.tokens, (pack.labels, pack.loss_weight, pack.sources)

    def to_compute(self) -> PackedBatch:
        """The pack of the next forward pass."""
        return self._loaded.popleft() if self._loaded else next(self._packs).to(self._device)


class PipelineStage(nn.Module):
    """The layers of this rank as the one layer of a stage: tokens or hidden states in, hidden states out.

    A teacher's hidden states travel beside those of the model.
    """

    def __init__(self, model: GPT, grid: Grid, distillation: Distillation | None) -> None:
        super().__init__()
        self.model = model
        self._grid, self._distillation = grid, distillation
        self.feed: PackFeed | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [T] on the first stage, elsewhere the residual stream, to the residual stream."""
        assert self.feed is not None, "a schedule runs on a feed"
        pack = self.feed.to_compute()
        sharing = sharing_of(pack, self._grid)
        if self._distillation is None or not self._distillation.active:
            return self._blocks(x, pack, sharing)
        arrived = None
        if not self.model.stage.is_first:
            x, arrived = self._distillation.receive(x)
        self._distillation.begin_pack(pack, sharing, arrived)
        x = self._blocks(x, pack, sharing)
        return x if self.model.stage.is_last else self._distillation.hand_on(x)

    def _blocks(self, x: Tensor, pack: PackedBatch, sharing: Sharing | None) -> Tensor:
        x = self.model.embed(x) if self.model.stage.is_first else x
        return self.model.blocks(x, self.model.context(pack.positions, pack.cu_seqlens, pack.max_seqlen, sharing))


class PipelineLoss:
    """The loss on the last stage; records what it sees on the way."""

    def __init__(self, model: GPT) -> None:
        self._model = model
        self.denominator = 1.0
        self.losses = LossSums(0)

    def __call__(self, x: Tensor, labels: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Sum of the weighted losses of a pack over the denominator. ``labels``: labels, weights and sources."""
        targets, loss_weight, sources = labels
        loss_sum, token_loss = self._model.loss(x, targets, loss_weight)
        self.losses.add(token_loss, loss_weight, sources)
        return loss_sum / self.denominator


class PipelinePasses:
    """See ``Passes``. The arguments are those of ``owner_engine``."""

    in_rounds = True
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
        self._stage, self._loss = PipelineStage(model, grid, distillation), PipelineLoss(model)
        shape = grid.shape
        with silenced():
            pipeline = PipelineModule(
                [self._stage if stage == grid.stage else nn.Identity() for stage in range(shape.pp)],
                topology=PipeModelDataParallelTopology(shape.pp, shape.tp, shape.dp),
                loss_fn=self._loss,
                partition_method="uniform",
                dynamic_shape=True,
            )
            self._engine, *_ = deepspeed.initialize(model=pipeline, optimizer=optimizer, config=deepspeed_config, dist_init_required=False)
        self._engine.pipeline_enable_backward_allreduce = False
        self._weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._device, self._activity = grid.world.device, grid.world.activity
        self._engine._INSTRUCTION_MAP = {kind: self._telling(kind, run) for kind, run in self._engine._INSTRUCTION_MAP.items()}

    def _telling(self, kind: type[schedule.PipeInstruction], run: Callable[..., None]) -> Callable[..., None]:
        """``run``, which says what begins."""
        phase = PHASES.get(kind, "exchange")

        def telling(*arguments: Any, **named: Any) -> None:
            self._activity.begin(phase)
            run(*arguments, **named)

        return telling

    def train(self, packs: Packs, denominator: float, losses: LossSums) -> None:
        """See ``Passes``."""
        self._loss.denominator = denominator
        begin = time.perf_counter()
        feed = self._prepare(packs, losses)
        self._engine.micro_batches = len(packs)
        self._engine.train_batch(feed)
        self.pack_seconds = time.perf_counter() - begin
        self._activity.begin("optimizer")

    def evaluate(self, packs: Packs, losses: LossSums) -> None:
        """See ``Passes``."""
        feed = self._prepare(packs, losses)
        self._engine.eval_batch(feed, reduce_output=None, bcast_loss=False, num_micro_batches=len(packs))

    def _prepare(self, packs: Packs, losses: LossSums) -> PackFeed:
        self._loss.losses = losses
        self._stage.feed = PackFeed(packs, self._device)
        return self._stage.feed

    def weight(self, name: str) -> torch.Tensor:
        """See ``Passes``."""
        return self._weights[name]

    def close(self) -> None:
        """See ``Passes``."""
        self._engine.destroy()
