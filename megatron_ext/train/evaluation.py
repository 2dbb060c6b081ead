"""Loss on the validation sets, shared by all ranks."""

from dataclasses import dataclass

import torch

from megatron_ext.data.batch import read_pack
from megatron_ext.data.validation import ValidationSet
from megatron_ext.parallel.world import World
from megatron_ext.planning import plan_step
from megatron_ext.train.engine import losses_by_source


@dataclass(frozen=True)
class EvaluationResult:
    """Mean loss of one validation set in nats a token."""

    source: str
    split: str
    loss: float
    tokens: int


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, sets: list[ValidationSet], world: World, tokens_per_pack: int, vocab_size: int
) -> list[EvaluationResult]:
    """Evaluate every set. All ranks call it and get the same result.

    Args:
        model: as for ``Engine``.
        sets: what to evaluate.
        world: the ranks that share the work.
        tokens_per_pack: most tokens that a rank computes at once.
        vocab_size: rows of the embedding.
    """
    results = []
    for each in sets:
        plan = plan_step([len(piece) for piece in each.pieces], world.size, tokens_per_pack=tokens_per_pack)
        sums = torch.zeros(2, 1, dtype=torch.float64)
        for pack in plan.packs_of(world.rank):
            batch = read_pack(pack, each.pieces, [each.corpus], vocab_size).to(world.device)
            sums += losses_by_source(batch, model(*batch.model_inputs)[1], 1)
        loss, tokens = world.sum(sums).flatten().tolist()
        results.append(EvaluationResult(each.name, each.split, loss / max(1.0, tokens), int(tokens)))
    return results
