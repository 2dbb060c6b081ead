"""A frozen teacher beside the model that is trained: it computes the same packs on the same ranks, and adds to the loss."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ext.config.objective_options import DistillationOptions
from megatron_ext.data.batch import PackedBatch
from megatron_ext.model.distillation import attach_loss, hidden_distance, linear_kl_divergence
from megatron_ext.model.gpt import GPT
from megatron_ext.model.norm_kinds import normalized
from megatron_ext.parallel.grid import Grid
from megatron_ext.parallel.sequence import Sharing


class Distillation:
    """Attaches the losses of ``options`` to the hidden states of ``student`` while it trains, wherever its stages lie.

    With weights w of the tokens' losses and their sum W over the step, adds (sum of w (a KL + b distance)) / W. The teacher costs a
    forward pass; of its activations those that are compared stay until backward. Through a pipeline its hidden states travel beside the
    student's.

    Args:
        student: this rank's part; its blocks, final norm and loss are hooked.
        teacher: this rank's part, in the student's dtype.
        options: weights, layers, sources.
        sources: names of all sources.
        grid: the ranks.
        gradient_factor: gradients inside the model are the loss's, times this.
    """

    def __init__(
        self, student: GPT, teacher: GPT, options: DistillationOptions, sources: Sequence[str], grid: Grid, gradient_factor: float = 1.0
    ) -> None:
        self.teacher, self._student, self._options, self._grid = teacher.eval().requires_grad_(False), student, options, grid
        self._gradient_factor = gradient_factor
        self._last = student.config.num_layers
        hidden = options.hidden
        self._layers = frozenset() if hidden is None else frozenset([self._last] if hidden.layers is None else hidden.layers)
        self._chosen = {name: _chosen(part.sources if part else [], sources) for name, part in (("kl", options.kl), ("hidden", hidden))}
        self._weights = {"kl": 0.0, "hidden": 0.0}
        self._denominator = 1.0
        self._sums = torch.zeros(2, dtype=torch.float64, device=grid.world.device)
        self._batch: PackedBatch | None = None
        """Of the pack on its way; None: nothing is attached."""
        self._states: dict[int, Tensor] = {}
        self._stream: Tensor | None = None
        self._hook(student)

    def begin_step(self, step: int, denominator: float) -> None:
        """Step number ``step``, from 1 on, begins, whose weights of losses add up to ``denominator``, or 0."""
        factor = self._options.factor(step)
        kl, hidden = self._options.kl, self._options.hidden
        self._weights = {"kl": factor * kl.weight if kl else 0.0, "hidden": factor * hidden.weight if hidden else 0.0}
        self._denominator = denominator or 1.0
        self._batch = None
        self._sums.zero_()

    @property
    def active(self) -> bool:
        """The teacher has something to say in this step; never in evaluation."""
        return self._student.training and any(self._weights.values())

    @torch.no_grad()
    def begin_pack(self, batch: PackedBatch, sharing: Sharing | None, arrived: Tensor | None = None) -> None:
        """Let the teacher compute its part of a pack which the student is about to compute.

        ``arrived``: its residual stream from the stage before.
        """
        teacher = self.teacher
        pack = teacher.context(batch.positions, batch.cu_seqlens, batch.max_seqlen, sharing)
        x = arrived if arrived is not None else teacher.embed(batch.tokens)
        states = {0: x} if "0" in teacher.model.layers and 0 in self._layers else {}
        for number, block in teacher.model.layers.items():
            x = block(x, pack)
            if int(number) + 1 in self._layers:
                states[int(number) + 1] = x
        if teacher.model.norm is not None and self._last in self._layers:
            states[self._last] = normalized(teacher.model.norm, x, teacher.tp, pack.tokens)
        self._states, self._stream, self._batch = states, x, batch

    def receive(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's part of what the stage before handed on."""
        width = self._student.config.hidden_size
        return x[:, :width], x[:, width:].detach()

    def hand_on(self, x: Tensor) -> Tensor:
        """The student's residual stream ``x`` and the teacher's, side by side, for the next stage."""
        assert self._stream is not None, "the teacher has computed the pack"
        return torch.cat([x, self._stream], 1)

    def records(self) -> dict[str, Any]:
        """For the metrics, over all ranks: means of the divergence and of the distance, by the weights of all losses of the step."""
        sums = self._grid.world.sum(self._sums.clone()) / self._denominator
        active = {name: float(value) for name, value in zip(("kl", "hidden"), sums, strict=True) if self._weights[name]}
        return {f"distillation_{name}": value for name, value in active.items()}

    def _hook(self, student: GPT) -> None:
        for number, block in student.model.layers.items():
            if number == "0":
                block.register_forward_pre_hook(self._before_first)
            if int(number) + 1 < self._last:
                block.register_forward_hook(self._behind(int(number) + 1))
        if student.model.norm is not None:
            student.model.norm.register_forward_hook(self._behind_norm)
            student.extend_loss = self._extend_loss

    def _before_first(self, block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._matched(0, arguments[0]), *arguments[1:])

    def _behind(self, depth: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        return lambda block, arguments, x: self._matched(depth, x)

    def _behind_norm(self, norm: nn.Module, arguments: tuple[Any, ...], x: Tensor) -> Tensor:
        return self._matched(self._last, x)

    def _extend_loss(self, loss: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
        """The sum of the weighted losses of a pack with its weighted divergence; see ``GPT.extend_loss``."""
        if self._batch is None or not self.active or not self._weights["kl"]:
            return loss
        assert self._stream is not None, "the teacher has computed the pack"
        with torch.no_grad():
            theirs = self.teacher.head_operands(self._stream, len(self._batch.tokens))
        tp = self._student.tp
        rows = tp.rows(self._student.config.vocab_size)
        divergence, _ = linear_kl_divergence((hidden, weight), theirs, self._token_weights("kl"), rows, tp.group, self._student.loss_tile)
        if tp.group.rank == 0:
            self._sums[0] += divergence.detach()
        return loss + self._weights["kl"] * divergence

    def _matched(self, depth: int, x: Tensor) -> Tensor:
        """The hidden states ``x`` of the student with their distance from the teacher's attached."""
        hidden = self._options.hidden
        if self._batch is None or not self.active or hidden is None or depth not in self._layers or not self._weights["hidden"]:
            return x
        tp = self._student.tp
        weight = self._token_weights("hidden")
        if tp.shard_tokens:
            # The last ranks' tokens are padded, with weight 0.
            padded = F.pad(weight, (0, len(x) * tp.group.size - len(weight)))
            weight = padded[len(x) * tp.group.rank : len(x) * (tp.group.rank + 1)]
        loss = hidden_distance(x, self._states.pop(depth), hidden.kind) @ weight
        if tp.shard_tokens or tp.group.rank == 0:
            self._sums[1] += loss.detach()
        return attach_loss(x, loss * (self._weights["hidden"] * self._gradient_factor / self._denominator))

    def _token_weights(self, name: str) -> Tensor:
        """Weights of this data rank's tokens in the loss ``name``, in the dtype of losses."""
        assert self._batch is not None, "a pack is on its way"
        wide = torch.promote_types(next(self._student.parameters()).dtype, torch.float32)
        weight = self._batch.loss_weight.to(wide)
        chosen = self._chosen[name]
        return weight if chosen is None else weight * chosen.to(weight)[self._batch.sources]


def _chosen(names: Sequence[str] | None, sources: Sequence[str]) -> Tensor | None:
    """1 for each source that is named and 0 for the others: float64 [sources]; None: all are."""
    return None if names is None else torch.tensor([float(source in names) for source in sources], dtype=torch.float64)
