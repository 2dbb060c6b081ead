"""What metrics.jsonl says of a training step: what follows from its documents, its plan and its result alone."""

from collections.abc import Sequence
from typing import Any

from megatron_ext.data.corpus import Piece
from megatron_ext.model.config import ModelConfig
from megatron_ext.train.engine import StepResult
from megatron_ext.train.metrics import length_histogram
from megatron_ext.train.step_plans import StepPlan


def step_flops(model: ModelConfig, pieces: Sequence[Piece]) -> float:
    """Operations a token, forward and backward, for documents as long as these."""
    return model.flops_per_token(sum(len(piece) ** 2 for piece in pieces) / sum(map(len, pieces)))


def step_record(
    pieces: Sequence[Piece],
    names: Sequence[str],
    plan: StepPlan,
    result: StepResult,
    seconds: float,
    flops: float,
    tokens_per_pack: int,
) -> dict[str, Any]:
    """The fields.

    Args:
        pieces: of the step.
        names: of the sources.
        plan: of the step.
        result: what the engine came to.
        seconds: that the step took.
        flops: as of ``step_flops``.
        tokens_per_pack: that a rank can hold.
    """
    lengths = [len(piece) for piece in pieces]
    tokens = sum(lengths)
    by_source = zip(names, result.loss_sums.tolist(), result.loss_tokens.tolist(), strict=True)
    return {
        "loss": result.loss,
        "loss_by_source": {name: loss / count for name, loss, count in by_source if count},
        "grad_norm": result.grad_norm,
        "tokens_per_second": tokens / seconds,
        "tflops": tokens * flops / seconds / 1e12,
        "step_seconds": seconds,
        "packs": sum(bool(pack.slices) for pack in plan.plan.packs),
        "pack_fill": plan.plan.fill(tokens_per_pack),
        "exchange_seconds": result.exchange_seconds,
        "length_histogram": length_histogram(lengths),
    }
