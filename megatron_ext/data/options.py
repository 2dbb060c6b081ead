"""What a user can say about data."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron_ext.option_rules import require


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

    def __post_init__(self) -> None:
        require(
            (bool(self.name), "name", self.name, "a word"),
            (bool(self.path), "path", self.path, "path of a .bin/.idx pair without its ending"),
            (self.weight > 0, "weight", self.weight, "more than 0"),
            (self.max_epochs is None or self.max_epochs > 0, "max_epochs", self.max_epochs, "more than 0, or null"),
        )


@dataclass
class ReplayOptions:
    """Documents of an earlier mixture, mixed into a continual phase so that it is not forgotten."""

    share: float
    """Share of all training tokens that come from the earlier mixture, between 0 and 1."""
    run: str | None = None
    """Run directory of the earlier phase: its sources and weights are replayed."""
    sources: list[SourceOptions] = field(default_factory=list)
    """The sources to replay, when there is no earlier run directory."""

    def __post_init__(self) -> None:
        require(
            (0 < self.share < 1, "share", self.share, "more than 0 and less than 1"),
            (bool(self.run) != bool(self.sources), "run", self.run, "exactly one of run and sources"),
            _distinct("sources", self.sources),
        )


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

    def __post_init__(self) -> None:
        names = {source.name for source in self.sources}
        replayed_too = [source.name for source in self.replay.sources if source.name in names] if self.replay else []
        held_out = [source.name for source in self.validation if source.name in names] if self.validation_fraction else []
        require(
            (bool(self.sources), "sources", self.sources, "at least one source"),
            (self.sequence_length >= 2, "sequence_length", self.sequence_length, "at least 2 tokens: one to read and one to predict"),
            (
                self.tokens_per_step >= self.sequence_length,
                "tokens_per_step",
                self.tokens_per_step,
                f"at least sequence_length ({self.sequence_length}), or the longest piece of a document fits no step",
            ),
            (0 <= self.validation_fraction < 1, "validation_fraction", self.validation_fraction, "at least 0 and less than 1"),
            _distinct("sources", self.sources),
            (not replayed_too, "replay.sources", replayed_too, "names that differ from those of sources"),
            _distinct("validation", self.validation),
            (
                not held_out,
                "validation",
                held_out,
                "names that differ from those of sources while validation_fraction is set",
            ),
        )


def _distinct(key: str, sources: Iterable[SourceOptions]) -> tuple[bool, str, object, str]:
    """The rule that no two sources whose losses are reported side by side have one name."""
    repeated = [name for name, count in Counter(source.name for source in sources).items() if count > 1]
    return not repeated, key, repeated, "names that differ"
