"""What gives a run its documents, step by step, from a state of a few integers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

from megatron_ext.data.corpus import Corpus, Piece
from megatron_ext.data.stages import Stage
from megatron_ext.errors import ConfigError, DataError


class Sampler(ABC):
    """An endless, deterministic order of pieces of documents."""

    corpora: list[Corpus]
    """The sources that pieces refer to."""
    stages: Sequence[Stage]
    """Of the run, in order."""

    @property
    @abstractmethod
    def stage(self) -> Stage:
        """The stage of the last step, or of the first one before it is taken."""

    @abstractmethod
    def copy(self) -> Self:
        """A sampler that goes on from here by itself."""

    @abstractmethod
    def take(self, most_tokens: int) -> list[Piece]:
        """The pieces of the next step: in order, until the next one would exceed ``most_tokens``."""

    @abstractmethod
    def epochs(self) -> dict[str, float]:
        """How often each source has been read, by name."""

    @abstractmethod
    def expected_tokens(self, total: int) -> list[float]:
        """Tokens of each source in a run of ``total`` tokens."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of everything that decides the order."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values, with the fingerprint."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any], allow_changed: bool = False) -> None:
        """Continue where ``state`` was taken.

        Args:
            state: of :meth:`state_dict`.
            allow_changed: accept other data, shares or stages. Sources known by name continue at their document; shares count anew from
                here.

        Raises:
            DataError: the data, shares, seed, sequence length or stages are not those of the state.
        """

    def check_epochs(self, total_tokens: int) -> None:
        """Raise ConfigError if a run of ``total_tokens`` would read a source more often than its ``max_epochs``."""
        for corpus, tokens in zip(self.corpora, self.expected_tokens(total_tokens), strict=True):
            epochs = tokens / corpus.training_tokens
            if corpus.max_epochs is not None and epochs > corpus.max_epochs:
                raise ConfigError(
                    f"source {corpus.name!r} would be read {epochs:.2f} times by {total_tokens:,} tokens with a share of "
                    f"{tokens / total_tokens:.3f}; "
                    f"its max_epochs is {corpus.max_epochs}. Accepted: a smaller weight, fewer train.steps, or a larger max_epochs"
                )

    def _is_changed(self, state: dict[str, Any], fingerprint: str, allow_changed: bool) -> bool:
        """Whether a state is not of the data that ``fingerprint`` says. Raises DataError if that is not allowed."""
        changed = state["fingerprint"] != fingerprint
        if changed and not allow_changed:
            raise DataError(
                f"the training data changed since the checkpoint (fingerprint {state['fingerprint']}, now {fingerprint}): "
                "a source, its files, weights, seed, split, data.sequence_length, data.decomposition or a stage that has begun differ "
                "(stages by share begin elsewhere with other train.steps). "
                "Set checkpoint.allow_changed_data=true to continue with the new data"
            )
        return changed
