"""What a user can say about data."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

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
    min_tokens: int | None = None
    """Leave out shorter documents. One corpus can be two sources: its long documents and its short ones."""
    max_tokens: int | None = None
    """Leave out longer documents."""
    scores: str | None = None
    """Path of a .npy file of float32 with a score, such as one of quality, for each document of the pair."""
    order: Literal["shuffled", "ascending", "descending"] = "shuffled"
    """Order of the documents in training: random, another in each epoch, or by ``scores``."""
    subset_tokens: int | None = None
    """Train on a fixed choice of documents with this many tokens, again and again; null: on all."""
    subset_by: Literal["hash", "score"] = "hash"
    """Which documents: random ones, or those with the highest ``scores``."""
    metadata: str | None = None
    """Path of a second pair, without its ending, with a row of tokens for each document, such as its URL. They stand before the document
    and are not predicted."""
    document_weights: str | None = None
    """A .npy file of float32, a weight of at least 0 for the losses of each document, in the order of the .idx; null: 1."""
    token_weights: str | None = None
    """A .npy file of float32, a weight of at least 0 for the loss of each token of the .bin, with which it is predicted; null: 1."""

    def __post_init__(self) -> None:
        require(
            (bool(self.name), "name", self.name, "a word"),
            (bool(self.path), "path", self.path, "path of a .bin/.idx pair without its ending"),
            (self.weight > 0, "weight", self.weight, "more than 0"),
            (self.max_epochs is None or self.max_epochs > 0, "max_epochs", self.max_epochs, "more than 0, or null"),
            (self.min_tokens is None or self.min_tokens >= 1, "min_tokens", self.min_tokens, "at least 1, or null"),
            (
                self.max_tokens is None or self.max_tokens >= (self.min_tokens or 1),
                "max_tokens",
                self.max_tokens,
                f"at least min_tokens ({self.min_tokens or 1}), or null",
            ),
            (self.subset_tokens is None or self.subset_tokens >= 1, "subset_tokens", self.subset_tokens, "at least 1, or null"),
            (self.order == "shuffled" or bool(self.scores), "order", self.order, "shuffled without scores"),
            (self.subset_by == "hash" or bool(self.scores), "subset_by", self.subset_by, "hash without scores"),
            (
                self.subset_by == "hash" or self.subset_tokens is not None,
                "subset_by",
                self.subset_by,
                "hash without subset_tokens",
            ),
            (
                not self.scores or self.order != "shuffled" or self.subset_by == "score",
                "scores",
                self.scores,
                "null, because neither order nor subset_by uses them",
            ),
        )

    @property
    def is_weighted(self) -> bool:
        """Whether the losses of its tokens have weights."""
        return self.document_weights is not None or self.token_weights is not None

    @property
    def selects(self) -> bool:
        """Whether documents are left out or sorted."""
        return any(each is not None for each in (self.min_tokens, self.max_tokens, self.scores, self.subset_tokens))


@dataclass
class ReplayDecayOptions:
    """How the share of replay changes over the run."""

    to: float
    """Share of replay in the end, at least 0 and less than 1."""
    tokens: int
    """Tokens of the run after which it is reached."""
    shape: Literal["linear", "cosine"] = "linear"
    """The way there."""

    def __post_init__(self) -> None:
        require((0 <= self.to < 1, "to", self.to, "at least 0 and less than 1"), (self.tokens >= 1, "tokens", self.tokens, "at least 1"))


@dataclass
class ReplayOptions:
    """Documents of an earlier mixture, mixed into a continual phase so that it is not forgotten."""

    share: float
    """Share of all training tokens that come from the earlier mixture, between 0 and 1."""
    run: str | None = None
    """Run directory of the earlier phase: its sources are replayed, by the weights that it has outside stages."""
    sources: list[SourceOptions] = field(default_factory=list)
    """The sources to replay, when there is no earlier run directory."""
    decay: ReplayDecayOptions | None = None
    """Lets the share change from ``share`` at the begin of the run; null: it stays."""

    def __post_init__(self) -> None:
        require(
            (0 < self.share < 1, "share", self.share, "more than 0 and less than 1"),
            (bool(self.run) != bool(self.sources), "run", self.run, "exactly one of run and sources"),
            _distinct("sources", self.sources),
        )


@dataclass
class StageOptions:
    """A part of the run with other data than the rest. What is null is as without stages."""

    tokens: int | None = None
    """Tokens until the next stage begins; null for the last, which lasts to the end of the run. A step belongs to the stage in which it
    begins."""
    share: float | None = None
    """Instead of ``tokens``, a share of the steps of the run, rounded down, but at least one. Steps are not always full, so the last stage
    would begin late if tokens were counted."""
    sequence_length: int | None = None
    """Longest piece of a document. A document that was read in part goes on at its next token."""
    weights: dict[str, float] | None = None
    """Weights of ``sources`` by name; those not named keep theirs, 0 leaves a source out."""
    replay_share: float | None = None
    """Constant share of replay, between 0 and 1."""
    metadata: bool = True
    """Whether documents begin with the metadata of their source; false in the last stage lets the model do without them (cool-down)."""

    def __post_init__(self) -> None:
        weights = self.weights or {}
        require(
            (self.tokens is None or self.tokens >= 1, "tokens", self.tokens, "at least 1, or null in the last stage"),
            (self.share is None or 0 < self.share < 1, "share", self.share, "more than 0 and less than 1, or null"),
            (self.tokens is None or self.share is None, "share", self.share, f"null, because tokens is set ({self.tokens})"),
            (self.sequence_length is None or self.sequence_length >= 2, "sequence_length", self.sequence_length, "at least 2, or null"),
            (all(weight >= 0 for weight in weights.values()), "weights", self.weights, "numbers of at least 0"),
            (self.replay_share is None or 0 <= self.replay_share <= 1, "replay_share", self.replay_share, "between 0 and 1, or null"),
        )

    @property
    def has_length(self) -> bool:
        """Whether the options say where the next stage begins."""
        return self.tokens is not None or self.share is not None


@dataclass
class DecompositionOptions:
    """Documents in pieces of powers of two, and steps of pieces of one length (Dataset Decomposition)."""

    cycle_tokens: int
    """Tokens of a cycle of the curriculum; in each, every length has its share of the tokens of the data."""
    smallest: int = 256
    """Tokens of the shortest pieces, a power of two. The rest of a document is a piece of its own."""
    curriculum: Literal["natural", "uniform", "grow_linear", "grow_p2", "grow_p100", "shrink_p100"] = "grow_p2"
    """Which lengths come first in a cycle: odds of the lengths that are not used up, from the shortest, fall by factors of 2 or 100,
    linearly, or rise (shrink); uniform: alike; natural: by their tokens, the same throughout the cycle."""

    def __post_init__(self) -> None:
        require(
            (self.cycle_tokens >= 1, "cycle_tokens", self.cycle_tokens, "at least 1"),
            (self.smallest >= 1 and self.smallest.bit_count() == 1, "smallest", self.smallest, "a power of two"),
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
    stages: list[StageOptions] = field(default_factory=list)
    """Parts of the run, in order, that differ in sequence length, weights or replay; empty: the whole run is alike."""
    decomposition: DecompositionOptions | None = None
    """Cut documents into pieces of powers of two and take one length at each step; null: pieces of ``sequence_length``."""
    repeats_warned_at: float | None = 4.0
    """Warn when a source has been read more often than this: up to about 4 epochs, repeated data are nearly as good as new (Muennighoff et
    al. 2023, arXiv:2305.16264). null: never."""
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
                self.tokens_per_step >= self.longest_sequence,
                "tokens_per_step",
                self.tokens_per_step,
                f"at least sequence_length ({self.longest_sequence}), or the longest piece of a document fits no step",
            ),
            (0 <= self.validation_fraction < 1, "validation_fraction", self.validation_fraction, "at least 0 and less than 1"),
            (
                self.repeats_warned_at is None or self.repeats_warned_at > 0,
                "repeats_warned_at",
                self.repeats_warned_at,
                "more than 0, or null",
            ),
            _distinct("sources", self.sources),
            (not replayed_too, "replay.sources", replayed_too, "names that differ from those of sources"),
            _distinct("validation", self.validation),
            (
                not held_out,
                "validation",
                held_out,
                "names that differ from those of sources while validation_fraction is set",
            ),
            *self._stage_rules(),
            *self._decomposition_rules(),
            *self._validation_rules(),
        )

    @property
    def longest_sequence(self) -> int:
        """Most tokens of a piece in any stage."""
        return max([stage.sequence_length or self.sequence_length for stage in self.stages], default=self.sequence_length)

    def stage_begins(self, total_steps: int) -> list[tuple[int, int | None]]:
        """Where stages begin in a run of so many steps: tokens before each, and steps if those decide (see ``Stage``).

        From the first stage on whose length is a share, ends are places in the run: tokens before it count as full steps.
        """
        begins: list[tuple[int, int | None]] = [(0, None)]
        tokens, share, step = 0, 0.0, 0
        for stage in self.stages[:-1]:
            tokens, share = tokens + (stage.tokens or 0), share + (stage.share or 0.0)
            if stage.share is None:
                begins.append((tokens, None))
                continue
            # Rounded first: shares such as 0.1 + 0.2 are not quite what they seem.
            step = max(step + 1, int(round(tokens / self.tokens_per_step + share * total_steps, 6)))
            begins.append((step * self.tokens_per_step, step))
        return begins

    def _validation_rules(self) -> Iterator[tuple[bool, str, object, str]]:
        plain = SourceOptions("plain", "plain")
        for number, source in enumerate(self.validation):
            for key in ("max_epochs", "metadata", "document_weights", "token_weights", "order", "subset_tokens"):
                value = getattr(source, key)
                unset = value == getattr(plain, key)
                yield unset, f"validation.{number}.{key}", value, "nothing: it is for training, and evaluation would not heed it"

    def _stage_rules(self) -> Iterator[tuple[bool, str, object, str]]:
        names = [source.name for source in self.sources]
        replayed = self.replay.sources if self.replay else []
        has_metadata = any(source.metadata for source in [*self.sources, *replayed]) or bool(self.replay and self.replay.run)
        shares = 0.0
        for number, stage in enumerate(self.stages):
            shares += stage.share or 0.0
            yield stage.share is None or shares < 1, f"stages.{number}.share", stage.share, "shares of the run that sum to less than 1"
            key, weights = f"stages.{number}", stage.weights or {}
            unknown = [name for name in weights if name not in names]
            some = any(weights.get(source.name, source.weight) > 0 for source in self.sources)
            is_last = number == len(self.stages) - 1
            yield stage.has_length or is_last, f"{key}.tokens", stage.tokens, "tokens or share in every stage but the last"
            after_share = shares > 0 and stage.tokens is not None
            yield not after_share, f"{key}.tokens", stage.tokens, "null behind a stage with a share; stages with tokens come first"
            yield not unknown, f"{key}.weights", unknown, f"names of data.sources: {', '.join(names)}"
            yield some, f"{key}.weights", stage.weights, "more than 0 for at least one source"
            yield stage.metadata or has_metadata, f"{key}.metadata", stage.metadata, "true where no source has metadata"
            replays = stage.replay_share is None or self.replay is not None
            yield replays, f"{key}.replay_share", stage.replay_share, "null without data.replay"

    def _decomposition_rules(self) -> Iterator[tuple[bool, str, object, str]]:
        if self.decomposition is None:
            return
        length, smallest = self.sequence_length, self.decomposition.smallest
        yield length.bit_count() == 1, "sequence_length", length, "a power of two with decomposition"
        yield smallest <= length, "decomposition.smallest", smallest, f"at most sequence_length ({length})"
        cycle, step = self.decomposition.cycle_tokens, self.tokens_per_step
        yield cycle >= step, "decomposition.cycle_tokens", cycle, f"at least tokens_per_step ({step})"
        yield not self.stages, "stages", f"{len(self.stages)} stages", "none with decomposition"
        decay = self.replay.decay if self.replay else None
        yield decay is None, "replay.decay", decay, "null with decomposition"


def _distinct(key: str, sources: Iterable[SourceOptions]) -> tuple[bool, str, object, str]:
    """The rule that no two sources whose losses are reported side by side have one name."""
    repeated = [name for name, count in Counter(source.name for source in sources).items() if count > 1]
    return not repeated, key, repeated, "names that differ"
