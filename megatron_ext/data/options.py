"""What a user can say about data."""

from dataclasses import dataclass, field


@dataclass
class SourceOptions:
    """One corpus: a .bin/.idx pair in Megatron's format."""

    name: str
    """Name of the corpus in logs, metrics and reports."""
    path: str
    """Path of the pair without its .bin or .idx ending."""
    weight: float = 1.0
    """Share of tokens, relative to the other sources of the same list."""
    max_epochs: float | None = None
    """Refuse to read the corpus more often than this; null: no limit."""


@dataclass
class ReplayOptions:
    """Documents of an earlier mixture, mixed into a continual phase so that it is not forgotten."""

    share: float
    """Share of all training tokens that come from the earlier mixture, between 0 and 1."""
    run: str | None = None
    """Run directory of the earlier phase: its sources and weights are replayed."""
    sources: list[SourceOptions] = field(default_factory=list)
    """The sources to replay, when there is no earlier run directory."""


@dataclass
class DataOptions:
    """Where documents come from and how many tokens make a step."""

    sources: list[SourceOptions]
    """The training mixture."""
    sequence_length: int
    """Longest piece of a document, in tokens, that attends to itself. Longer documents are cut, never dropped."""
    tokens_per_step: int
    """Documents are taken in order until the next would exceed this many tokens, whatever the number of ranks."""
    replay: ReplayOptions | None = None
    """Optional share of an earlier mixture."""
    validation: list[SourceOptions] = field(default_factory=list)
    """Corpora to evaluate on; weights are ignored."""
    validation_fraction: float = 0.0
    """Share of documents of each training source held out for validation, chosen by document hash."""
