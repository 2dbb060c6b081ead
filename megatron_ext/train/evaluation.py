"""Loss on the validation sets, shared by all ranks."""

from dataclasses import dataclass

from megatron_ext.data.validation import ValidationSet
from megatron_ext.planning import CostModel, plan_step
from megatron_ext.train.engine import Engine
from megatron_ext.train.packs import PlannedPacks


@dataclass(frozen=True)
class EvaluationResult:
    """Mean loss of one validation set in nats a token."""

    source: str
    split: str
    loss: float
    tokens: int


def evaluate(engine: Engine, sets: list[ValidationSet], tokens_per_pack: int, vocab_size: int) -> list[EvaluationResult]:
    """Evaluate every set. All ranks call it and get the same result.

    Args:
        engine: of the model.
        sets: what to evaluate.
        tokens_per_pack: most tokens that a rank computes at once.
        vocab_size: rows of the embedding.
    """
    results = []
    for each in sets:
        lengths = [len(piece) for piece in each.pieces]
        plan = plan_step(lengths, engine.grid.shape.dp, CostModel(tokens_per_pack), in_rounds=engine.in_rounds)
        packs = PlannedPacks(engine.packs_of(plan), each.pieces, [each.corpus], vocab_size, engine.grid.dp.rank)
        loss, tokens = engine.evaluate(packs)
        results.append(EvaluationResult(each.name, each.split, loss / max(1.0, tokens), int(tokens)))
    return results
