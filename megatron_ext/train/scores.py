"""Sums of losses, and of labels that are the model's likeliest token, in groups that are numbered as the sources of a batch."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_ext.model.gpt import GPT
from megatron_ext.model.greedy import is_likeliest
from megatron_ext.train.losses import LossSums


class ScoreSums(LossSums):
    """``LossSums`` with a third row: labels with weight that are what the model would have chosen. Packs count inside ``watching``.

    Args:
        model: this rank's part.
        num_groups: groups of tokens; ``PackedBatch.sources`` has the group of each.
    """

    def __init__(self, model: GPT, num_groups: int) -> None:
        super().__init__(num_groups)
        self.values = torch.zeros(3, num_groups, dtype=torch.float64)
        self._model = model
        self._hits: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The model's choices are looked at inside this context."""
        self._model.observe_head = self._observe
        try:
            yield
        finally:
            self._model.observe_head = None

    def add(self, token_loss: Tensor, loss_weight: Tensor, sources: Tensor) -> None:
        """See ``LossSums``; the pack is the one whose loss the model computed last."""
        assert self._hits is not None, "packs count inside watching()"
        super().add(token_loss, loss_weight, sources)
        hits, self._hits = self._hits, None
        self.values[2] += torch.zeros_like(self.values[2], device=hits.device).index_add_(0, sources, hits).cpu()

    @torch.no_grad()
    def _observe(self, hidden: Tensor, weight: Tensor, labels: Tensor, loss_weight: Tensor) -> None:
        model, rows = self._model, loss_weight.nonzero().squeeze(1)
        self._hits = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
        likeliest = is_likeliest(hidden[rows], weight, labels[rows], model.tp.rows(model.config.vocab_size), model.tp.group)
        self._hits[rows] = likeliest.double()
