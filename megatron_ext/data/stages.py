"""Stages of a run: from which token on which documents make up the mixture, and how long their pieces are."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.data.shares import Shares


@dataclass(frozen=True)
class Stage:
    """What holds from ``begin`` until the next stage begins. A step belongs to the stage in which it begins."""

    begin: int
    """Tokens trained before it; at most those where ``begin_step`` is given."""
    sequence_length: int
    """Longer documents are cut into consecutive pieces of this many tokens."""
    shares: Shares
    """Of the tokens, by number of the source. They are counted from the first step of the stage."""
    metadata: bool = True
    """Documents begin with their metadata, where a source has any."""
    begin_step: int | None = None
    """Steps taken before it. Then steps decide when it begins: they may be less than full, but there are so many of them."""

    def has_begun(self, tokens: int, steps: int) -> bool:
        """Whether a step that begins after so many tokens and steps belongs to this stage or a later one."""
        return tokens >= self.begin if self.begin_step is None else steps >= self.begin_step

    @property
    def where(self) -> str:
        """Where it begins, in words."""
        return f"{self.begin:,} tokens" if self.begin_step is None else f"step {self.begin_step + 1:,}"


def stage_at(stages: Sequence[Stage], tokens: int, steps: int) -> Stage:
    """The stage of a step that begins after so many tokens and steps. ``stages`` are in order, the first begins at 0."""
    return next(stage for stage in reversed(stages) if stage.has_begun(tokens, steps))


def expected_tokens(stages: Sequence[Stage], source: int, total: int) -> float:
    """Tokens of a source in a run of ``total`` tokens, if steps are full."""
    ends = [*(stage.begin for stage in stages[1:]), total]
    spans = ((stage, min(end, total)) for stage, end in zip(stages, ends, strict=True))
    return sum(stage.shares.amount(source, stage.begin, end) for stage, end in spans if stage.begin < end)
