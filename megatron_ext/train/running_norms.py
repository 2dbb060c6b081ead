"""Statistics of norms over tokens, brought up to date when a step ends."""

from typing import Any

import torch
from torch import Tensor

from megatron_ext.model.gpt import GPT
from megatron_ext.model.running_norm import RUNNING, RunningNorm, StepMeans
from megatron_ext.optim.extension import Constraint
from megatron_ext.optim.ownership import OwnedBox
from megatron_ext.parallel.grid import Grid


class RunningNormUpdate:
    """A ``Constraint``: adds up what the norms of a model counted on all ranks that hold other tokens, and updates their statistics.

    A step that is skipped, or has no tokens, changes none. Sends 8 bytes a channel of every norm over the data ranks.

    Args:
        model: this rank's part.
        grid: the ranks.
        beside: another constraint, which comes first.
    """

    def __init__(self, model: GPT, grid: Grid, beside: Constraint | None = None) -> None:
        self._beside = beside
        self._norms = {name: module for name, module in model.named_modules() if isinstance(module, RunningNorm)}
        self._groups = [grid.dp, grid.tp] if model.tp.shard_tokens else [grid.dp]
        self._means: dict[str, StepMeans] = {}

    def prepare(self) -> None:
        """See ``Constraint``."""
        if self._beside is not None:
            self._beside.prepare()
        if not self._norms:
            return
        taken = [norm.take_sums() for norm in self._norms.values()]
        flat = torch.cat(taken)
        for group in self._groups:
            flat = group.all_reduce(flat)
        sums = zip(self._norms.items(), flat.split([len(each) for each in taken]), strict=True)
        self._means = {name: StepMeans(norm, total) for (name, norm), total in sums if total[-1] > 0}

    def apply(self, part: OwnedBox, master: Tensor) -> None:
        """See ``Constraint``."""
        if self._beside is not None:
            self._beside.apply(part, master)
        module, _, name = part.name.rpartition(".")
        if name in RUNNING and module in self._means:
            rows = slice(*part.box[0])
            master.copy_(self._norms[module].updated(name, master.detach(), rows, self._means[module]))

    def records(self) -> dict[str, Any]:
        """See ``Constraint``."""
        return {} if self._beside is None else self._beside.records()
