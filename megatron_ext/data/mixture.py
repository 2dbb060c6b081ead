"""Which document comes next, from which source: a deterministic mixture whose whole state is a few integers."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_ext.data.corpus import Corpus, Piece, cut
from megatron_ext.errors import ConfigError, DataError

STATE_VERSION = 1


@dataclass
class Cursor:
    """How far one source has been read."""

    position: int = 0
    """Position in the endless shuffled order; ``position // len(corpus)`` epochs are complete."""
    start: int = 0
    """First token of the document at ``position`` that has not been taken."""
    tokens: int = 0
    """Tokens taken since the mixture was defined. Decides which source is next."""


class Mixture:
    """Documents of several corpora by share of tokens.

    Of the sources that are not ahead of their share, the next piece comes from the one that its piece brings to it soonest (Bennett and
    Zhang 1996, "WF2Q: Worst-case Fair Weighted Fair Queueing"). So the tokens of every source are its share at every point of the run to
    within one piece, and the order depends on nothing but the seed: not on ranks, restarts or the size of a step.

    Args:
        corpora: the sources.
        shares: share of the tokens of each source; they are normalized.
        seed: chooses the order.
        sequence_length: longer documents are cut into consecutive pieces of this many tokens.
    """

    def __init__(self, corpora: Sequence[Corpus], shares: Sequence[float], seed: int, sequence_length: int) -> None:
        self.corpora = list(corpora)
        self.shares = [share / sum(shares) for share in shares]
        self.seed = seed
        self.sequence_length = sequence_length
        self.cursors = [Cursor() for _ in corpora]
        self._streams = [self._stream(source) for source in range(len(self.corpora))]
        self._ahead: list[Piece] = [next(stream) for stream in self._streams]

    def copy(self) -> "Mixture":
        """A mixture that goes on from here by itself."""
        other = Mixture(self.corpora, self.shares, self.seed, self.sequence_length)
        other.load_state_dict(self.state_dict())
        return other

    def _stream(self, source: int) -> Iterator[Piece]:
        """Pieces of a source from its cursor on. The cursor stands at the piece that was yielded last."""
        cursor, corpus = self.cursors[source], self.corpora[source]
        start = cursor.start
        for position, document in corpus.shuffled(str(self.seed), cursor.position):
            for piece in cut(source, document, corpus.length(document), self.sequence_length, start):
                cursor.position, cursor.start = position, piece.start
                yield piece
            start = 0

    def _next_source(self) -> int:
        total = sum(cursor.tokens for cursor in self.cursors)
        starts = [cursor.tokens / share for cursor, share in zip(self.cursors, self.shares, strict=True)]
        ends = [start + len(piece) / share for start, piece, share in zip(starts, self._ahead, self.shares, strict=True)]
        # Rounding could put every source ahead by an ulp; the one that is least ahead is always due.
        now = max(total, min(starts))
        return min((i for i, start in enumerate(starts) if start <= now), key=lambda i: (ends[i], i))

    def take(self, most_tokens: int) -> list[Piece]:
        """The pieces of the next step: in order, until the next one would exceed ``most_tokens``."""
        pieces: list[Piece] = []
        room = most_tokens
        while len(self._ahead[source := self._next_source()]) <= room:
            piece = self._ahead[source]
            pieces.append(piece)
            room -= len(piece)
            self.cursors[source].tokens += len(piece)
            self._ahead[source] = next(self._streams[source])
        return pieces

    def epochs(self) -> dict[str, float]:
        """How often each source has been read, by name."""
        return {corpus.name: cursor.position / len(corpus) for corpus, cursor in zip(self.corpora, self.cursors, strict=True)}

    def check_epochs(self, total_tokens: int) -> None:
        """Raise ConfigError if a run of ``total_tokens`` would read a source more often than its ``max_epochs``."""
        for corpus, share in zip(self.corpora, self.shares, strict=True):
            epochs = share * total_tokens / (corpus.dataset.num_tokens * (1.0 - corpus.held_out))
            if corpus.max_epochs is not None and epochs > corpus.max_epochs:
                raise ConfigError(
                    f"source {corpus.name!r} would be read {epochs:.2f} times by {total_tokens:,} tokens with a share of {share:.3f}; "
                    f"its max_epochs is {corpus.max_epochs}. Accepted: a smaller weight, fewer train.steps, or a larger max_epochs"
                )

    def fingerprint(self) -> str:
        """Hash of everything that decides the order: the data, the shares, the split, the seed and the sequence length."""
        sources = [[c.name, c.dataset.fingerprint(), c.held_out, share] for c, share in zip(self.corpora, self.shares, strict=True)]
        text = json.dumps([STATE_VERSION, self.seed, self.sequence_length, sources])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values: the fingerprint and three integers for each source."""
        cursors = {corpus.name: asdict(cursor) for corpus, cursor in zip(self.corpora, self.cursors, strict=True)}
        return {"version": STATE_VERSION, "fingerprint": self.fingerprint(), "cursors": cursors}

    def load_state_dict(self, state: dict[str, Any], allow_changed: bool = False) -> None:
        """Continue where ``state`` was taken.

        Args:
            state: of :meth:`state_dict`.
            allow_changed: accept other data or shares. Sources known by name continue at their document; shares count anew from here.

        Raises:
            DataError: the data, shares, seed or sequence length are not those of the state.
        """
        changed = state["fingerprint"] != self.fingerprint()
        if changed and not allow_changed:
            raise DataError(
                f"the training data changed since the checkpoint (fingerprint {state['fingerprint']}, now {self.fingerprint()}): "
                "a source, its files, weights, seed, split or data.sequence_length differ. "
                "Set checkpoint.allow_changed_data=true to continue with the new data"
            )
        for corpus, cursor in zip(self.corpora, self.cursors, strict=True):
            saved = Cursor(**state["cursors"].get(corpus.name, {}))
            cursor.position = saved.position
            cursor.start = saved.start if not changed else 0
            cursor.tokens = saved.tokens if not changed else 0
        self._streams = [self._stream(source) for source in range(len(self.corpora))]
        self._ahead = [next(stream) for stream in self._streams]
