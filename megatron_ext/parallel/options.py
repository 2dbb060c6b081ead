"""What a user can say about the grid of ranks."""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.option_rules import require


@dataclass
class ParallelOptions:
    """How the ranks divide the model. Data parallelism is what is left: world size / (tp pp)."""

    tp: int = 1
    """Tensor-parallel ranks: each holds a part of every matrix (Shoeybi et al. 2019, arXiv:1909.08053)."""
    pp: int = 1
    """Pipeline stages: each holds some of the layers (1F1B: Narayanan et al. 2021, arXiv:2104.04473)."""
    sequence_parallel_activations: bool = False
    """Between the matrices, divide activations over the tensor-parallel ranks by tokens (Korthikanti et al. 2022, arXiv:2205.05198)."""
    partition: Literal["parameters", "time"] = "parameters"
    """What is balanced between stages: ``parameters``, or the ``time`` of a layer and of the head, measured at start."""
    layers_per_stage: list[int] | None = None
    """Number of blocks of each stage, instead of ``partition``."""

    def __post_init__(self) -> None:
        layers = self.layers_per_stage
        require(
            (self.tp >= 1, "tp", self.tp, "at least 1"),
            (self.pp >= 1, "pp", self.pp, "at least 1"),
            (
                not self.sequence_parallel_activations or self.tp > 1,
                "sequence_parallel_activations",
                self.sequence_parallel_activations,
                "false, because tp is 1",
            ),
            (
                layers is None or (len(layers) == self.pp and min(layers) >= 0),
                "layers_per_stage",
                layers,
                f"{self.pp} numbers of blocks (pp), each at least 0, or null",
            ),
        )
