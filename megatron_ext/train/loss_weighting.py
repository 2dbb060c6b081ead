"""Weights of the documents of a step by what they lose in it (Sow et al. 2025, arXiv:2502.06733)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_ext.config import RunConfig
from megatron_ext.config.objective_options import LossWeightingOptions
from megatron_ext.data.corpus import Piece
from megatron_ext.data.loss_weights import LossWeights, Weights
from megatron_ext.train.engine import Engine
from megatron_ext.train.losses import LossSums
from megatron_ext.train.packs import PlannedPacks

STRATEGIES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "linupper": lambda h: (h + 1.0).clamp(max=1.0),
    "quadratic": lambda h: 1.0 - h.square(),
    "extremes": lambda h: h.abs(),
}
"""Of losses scaled to [-1, 1] (the paper's equations for LinUpper, Quadratic and Extremes, with alpha = 1)."""
NARROWEST = 1e-6
"""Range of losses, in nats, below which they count as equal."""


def weights_of_losses(losses: Tensor, strategy: str, temperature: float) -> Tensor:
    """Weights of mean 1 of documents whose mean losses are ``losses``, float64 [documents]: softmax(strategy(h) / temperature)."""
    if not len(losses):
        return losses
    low, high = losses.min(), losses.max()
    h = (2.0 * losses - low - high) / (high - low).clamp(min=NARROWEST)
    return len(losses) * torch.softmax(STRATEGIES[strategy](h) / temperature, 0)


class DocumentWeights:
    """``LossWeights`` of the pieces of a step, times those of ``files``."""

    def __init__(self, weights: Sequence[float], files: LossWeights | None) -> None:
        self._weights, self._files = weights, files

    def of(self, number: int, piece: Piece, predicted: slice) -> Weights:
        """See ``LossWeights``."""
        return self._weights[number] * (1.0 if self._files is None else self._files.of(number, piece, predicted))


class LossWeighting:
    """Finds the weights of each step from its losses before the step.

    The losses are those of a forward pass without gradients over the same packs, in evaluation mode, summed over all ranks: of a piece
    that several ranks share, over all its tokens. So the weights, and the step, are the same on every grid and by every plan.

    Args:
        options: which documents are weighted, and how.
        sources: names of all sources, in order.
        engine: of the model.
    """

    def __init__(self, options: LossWeightingOptions, sources: Sequence[str], engine: Engine) -> None:
        self._options, self._engine = options, engine
        self._unweighted: float | None = None
        self._chosen = [not options.sources or name in options.sources for name in sources]

    def weights(self, step: int, packs: PlannedPacks, files: LossWeights | None) -> LossWeights | None:
        """The weights of step number ``step``, whose packs on this rank are ``packs``, beside those of ``files``. All ranks call it."""
        self._unweighted = None
        if step < self._options.from_step:
            return files
        # A source of its own for each piece, so that losses are told apart by piece.
        pieces = [replace(piece, source=number) for number, piece in enumerate(packs.pieces)]
        apart = replace(packs, pieces=pieces, corpora=[packs.corpora[piece.source] for piece in packs.pieces], weights=None)
        sums, tokens = self._engine.evaluate(apart, LossSums(len(pieces)))
        self._unweighted = float(sums.sum() / tokens.sum().clamp(min=1.0))
        weighted = (tokens > 0) & torch.tensor([self._chosen[piece.source] for piece in packs.pieces])
        weights = torch.ones(len(pieces), dtype=torch.float64)
        weights[weighted] = weights_of_losses(sums[weighted] / tokens[weighted], self._options.strategy, self._options.temperature)
        return DocumentWeights(weights.tolist(), files)

    def records(self) -> dict[str, Any]:
        """For the metrics: the mean loss of the step without weights, before its update, in nats; the loss itself is weighted."""
        return {} if self._unweighted is None else {"unweighted_loss": self._unweighted}


def build_loss_weighting(config: RunConfig, sources: Sequence[str], engine: Engine) -> LossWeighting | None:
    """The weighting that the configuration asks for; None: none."""
    return None if config.loss_weighting is None else LossWeighting(config.loss_weighting, sources, engine)
