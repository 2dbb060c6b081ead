"""Which layers a pipeline stage holds."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """Blocks ``layers`` of the model; the first stage has the embedding too, the last one the final norm and the head."""

    layers: range
    is_first: bool
    is_last: bool


def whole_model(num_layers: int) -> Stage:
    """All layers."""
    return Stage(range(num_layers), True, True)


def stages(layers_per_stage: Sequence[int]) -> list[Stage]:
    """Stages of these numbers of blocks."""
    starts = [sum(layers_per_stage[:stage]) for stage in range(len(layers_per_stage) + 1)]
    last = len(layers_per_stage) - 1
    return [Stage(range(starts[n], starts[n + 1]), n == 0, n == last) for n in range(last + 1)]


def balanced(num_layers: int, num_stages: int, block: float, first: float, last: float) -> list[int]:
    """Blocks of each stage such that the most costly stage costs least.

    Args:
        num_layers: blocks of the model, at least one a stage.
        num_stages: stages.
        block: cost of a block.
        first: cost of the embedding, on top of the first stage's blocks.
        last: cost of the final norm and the head, on top of the last stage's.

    Returns:
        Numbers of blocks, one after another; of equally good ones that with the most even blocks.
    """
    counts = [0] * num_stages
    extra = [0.0] * num_stages
    extra[0] += first
    extra[-1] += last
    for _ in range(num_layers):
        cheapest = min(range(num_stages), key=lambda stage: (counts[stage] * block + extra[stage], counts[stage]))
        counts[cheapest] += 1
    return counts
