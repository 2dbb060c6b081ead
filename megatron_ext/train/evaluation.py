"""Loss on the validation sets, shared by all ranks, told apart by how much context a token has."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from megatron_ext.data.batch import PackedBatch
from megatron_ext.data.validation import ValidationSet
from megatron_ext.model.gpt import GPT
from megatron_ext.train.engine import Engine
from megatron_ext.train.losses import LossSums
from megatron_ext.train.packs import ChangedPacks, PlannedPacks
from megatron_ext.train.step_plans import StepPlanner


@dataclass(frozen=True)
class PositionLoss:
    """Mean loss in nats a token of the labelled tokens at positions ``start`` to ``stop`` (exclusive) of their documents."""

    start: int
    stop: int | None
    """None: no limit."""
    loss: float
    tokens: int


@dataclass(frozen=True)
class EvaluationResult:
    """Mean loss of one validation set in nats a token."""

    source: str
    split: str
    loss: float
    tokens: int
    by_position: list[PositionLoss]
    """The buckets that have tokens, by position."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is no float64."""
        return math.exp(self.loss) if self.loss < 709 else math.inf


def evaluate(
    engine: Engine, sets: Sequence[ValidationSet], planner: StepPlanner, vocab_size: int, position_buckets: Sequence[int] = ()
) -> list[EvaluationResult]:
    """Evaluate every set. All ranks call it and get the same result.

    Args:
        engine: of the model.
        sets: what to evaluate.
        planner: plans which rank evaluates what.
        vocab_size: rows of the embedding.
        position_buckets: positions at which a new bucket begins, ascending, without 0.
    """
    results = []
    for each in sets:
        plan = planner.now(each.pieces, [each.corpus])
        packs = PlannedPacks(engine.packs_of(plan), each.pieces, [each.corpus], vocab_size, engine.grid.dp.rank)
        losses = LossSums(len(position_buckets) + 1)
        sums = engine.evaluate(ChangedPacks(packs, partial(_by_position, position_buckets)), losses)
        results.append(_result(each.name, each.split, sums, position_buckets))
    return results


@torch.no_grad()
def evaluate_alone(model: GPT, name: str, packs: Sequence[PackedBatch], position_buckets: Sequence[int] = ()) -> EvaluationResult:
    """As ``evaluate``, for packs on the device of a model that this process has all of."""
    losses = LossSums(len(position_buckets) + 1)
    for pack in packs:
        batch = _by_position(position_buckets, pack)
        losses.add(model(*batch.model_inputs)[1], batch.loss_weight, batch.sources)
    return _result(name, "validation", losses.values, position_buckets)


def _by_position(edges: Sequence[int], batch: PackedBatch) -> PackedBatch:
    """``batch`` with the bucket of each token's position as its source."""
    bounds = torch.tensor(edges, dtype=torch.int64, device=batch.positions.device)
    return replace(batch, sources=torch.bucketize(batch.positions.long(), bounds, right=True))


def _result(source: str, split: str, sums: torch.Tensor, edges: Sequence[int]) -> EvaluationResult:
    loss, tokens = sums.sum(1).tolist()
    bounds = zip([0, *edges], [*edges, None], *sums.tolist(), strict=True)
    by_position = [PositionLoss(start, stop, nats / count, int(count)) for start, stop, nats, count in bounds if count]
    return EvaluationResult(source, split, loss / max(1.0, tokens), int(tokens), by_position)
