"""Stages of a run: from which token on which documents make up the mixture, and how long their pieces are."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.data.shares import Shares


@dataclass(frozen=True)
class Stage:
    """What holds from ``begin`` until the next stage begins. A step belongs to the stage in which it begins."""

    begin: int
    """Tokens trained before it."""
    sequence_length: int
    """Longer documents are cut into consecutive pieces of this many tokens."""
    shares: Shares
    """Of the tokens, by number of the source. They are counted from the first step of the stage."""
    metadata: bool = True
    """Documents begin with their metadata, where a source has any."""


def stage_at(stages: Sequence[Stage], tokens: int) -> Stage:
    """The stage of a step that begins after ``tokens`` tokens. ``stages`` are in order, the first begins at 0."""
    return stages[bisect_right([stage.begin for stage in stages], tokens) - 1]


def expected_tokens(stages: Sequence[Stage], source: int, total: int) -> float:
    """Tokens of a source in a run of ``total`` tokens."""
    ends = [*(stage.begin for stage in stages[1:]), total]
    spans = ((stage, min(end, total)) for stage, end in zip(stages, ends, strict=True))
    return sum(stage.shares.amount(source, stage.begin, end) for stage, end in spans if stage.begin < end)
