"""A model whose every weight is the weighted mean of those of several models of one shape.

The mean of checkpoints of a constant learning rate can stand for a decay (Hagele et al. 2024, arXiv:2405.18392).
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from megatron_ext.checkpoint.fold import Read
from megatron_ext.checkpoint.hf import load_hf_config
from megatron_ext.errors import CheckpointError
from megatron_ext.model.config import ModelConfig


def ema_weights(count: int, decay: float) -> list[float]:
    """Weights of ``count`` models, oldest first, in their exponential moving average, which begins at the oldest.

    Each further model has the share ``1 - decay`` of the new average. They add up to 1.
    """
    return [(1.0 - decay if number else 1.0) * decay ** (count - 1 - number) for number in range(count)]


def weighted_mean(reads: Sequence[Read], weights: Sequence[float]) -> Read:
    """Reads the mean of a parameter by its name, in float64, which adds the weights of low precision up without an error of its own.

    Args:
        reads: give a parameter of each model by its name.
        weights: of the models, in their order; their sum is taken as 1.
    """
    total = sum(weights)

    def read(name: str) -> Tensor:
        mean = reads[0](name).double().mul_(weights[0])
        for other, weight in zip(reads[1:], weights[1:], strict=True):
            mean.add_(other(name).double(), alpha=weight)
        return mean.div_(total)

    return read


def common_config(directories: Sequence[Path]) -> ModelConfig:
    """The shape that the models of all directories have.

    Raises:
        CheckpointError: one has another shape; names the first key that differs, with both values.
    """
    first = load_hf_config(directories[0])
    for directory in directories[1:]:
        other = asdict(load_hf_config(directory))
        for key, value in asdict(first).items():
            if other[key] != value:
                raise CheckpointError(
                    f"{directory}: {key} is {other[key]!r}, in {directories[0]} {value!r}; accepted are models of one shape"
                )
    return first
