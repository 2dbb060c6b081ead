"""Loss on the validation sets, shared by all ranks."""

from dataclasses import dataclass

from megatron_ext.data.validation import ValidationSet
from megatron_ext.train.engine import Engine
from megatron_ext.train.packs import PlannedPacks
from megatron_ext.train.step_plans import StepPlanner


@dataclass(frozen=True)
class EvaluationResult:
    """Mean loss of one validation set in nats a token."""

    source: str
    split: str
    loss: float
    tokens: int


def evaluate(engine: Engine, sets: list[ValidationSet], planner: StepPlanner, vocab_size: int) -> list[EvaluationResult]:
    """Evaluate every set. All ranks call it and get the same result.

    Args:
        engine: of the model.
        sets: what to evaluate.
        planner: plans which rank evaluates what.
        vocab_size: rows of the embedding.
    """
    results = []
    for each in sets:
        plan = planner.now(each.pieces, [each.corpus])
        packs = PlannedPacks(engine.packs_of(plan), each.pieces, [each.corpus], vocab_size, engine.grid.dp.rank)
        loss, tokens = engine.evaluate(packs)
        results.append(EvaluationResult(each.name, each.split, loss / max(1.0, tokens), int(tokens)))
    return results
