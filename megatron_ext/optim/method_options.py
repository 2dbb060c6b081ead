"""What a user can say about methods that change updates."""

from dataclasses import dataclass

from megatron_ext.option_rules import require


@dataclass
class HalfFineTuningOptions:
    """Half fine-tuning (Hui et al. 2024, arXiv:2404.18466): half of the linears and norms of every block are frozen, drawn by stage."""

    stage_steps: int
    """Steps of a stage, after which the frozen half is drawn anew; as many as the run has: it never is."""

    def __post_init__(self) -> None:
        require((self.stage_steps >= 1, "stage_steps", self.stage_steps, "at least 1"))


@dataclass
class MagnitudeGateOptions:
    """Updates gated by output magnitude (MIGU: Du et al. 2024, arXiv:2406.17245)."""

    threshold: float = 0.7
    """Share of the rows of every linear in blocks that a step freezes: those whose outputs have the smallest mean share of their token's
    sum of magnitudes. The default is that of the released code, whose quantile means the same."""

    def __post_init__(self) -> None:
        require((0 <= self.threshold < 1, "threshold", self.threshold, "at least 0 and less than 1"))


@dataclass
class MetaExperienceReplayOptions:
    """The meta-update of meta-experience replay (Riemer et al. 2019, arXiv:1810.11910), to be used with ``data.replay``."""

    every: int
    """Steps from one meta-update to the next."""
    factor: float
    """Share of the way since the last meta-update that is kept."""

    def __post_init__(self) -> None:
        require(
            (self.every >= 1, "every", self.every, "a number of steps, at least 1"),
            (0 < self.factor <= 1, "factor", self.factor, "more than 0 and at most 1"),
        )
