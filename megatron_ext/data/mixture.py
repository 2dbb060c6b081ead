"""Which document comes next, from which source: a deterministic mixture whose whole state is a few integers."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_ext.data.corpus import Corpus, Piece
from megatron_ext.data.sampler import Sampler
from megatron_ext.data.shares import ConstantShares, Shares, Turns
from megatron_ext.data.stages import Stage, expected_tokens, stage_at
from megatron_ext.errors import DataError

STATE_VERSION = 1


@dataclass
class Cursor:
    """How far one source has been read."""

    position: int = 0
    """Position in the endless shuffled order; ``position // len(corpus)`` epochs are complete."""
    start: int = 0
    """First token of the document at ``position`` that has not been taken."""
    tokens: int = 0
    """Tokens taken since the stage began. Decides which source is next."""


class Mixture(Sampler):
    """Documents of several corpora by share of tokens, in one stage of a run after the other.

    The tokens of every source are its share at every point of a stage to within one piece (see ``Turns``), and the order depends on
    nothing but the seed: not on ranks or restarts. Stages begin with steps; within one, the order does not depend on the size of a step.
    A document that was read in part when a stage begins goes on at its next token.

    Args:
        corpora: the sources.
        shares: share of the tokens of each source; they are normalized if they are numbers.
        seed: chooses the order.
        sequence_length: longer documents are cut into consecutive pieces of this many tokens.
        metadata: documents begin with their metadata, where a source has any.
        later: the stages that follow the one that the arguments above describe.

    Raises:
        DataError: the metadata of a document fill a sequence.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        shares: Sequence[float] | Shares,
        seed: int,
        sequence_length: int,
        metadata: bool = True,
        later: Sequence[Stage] = (),
    ) -> None:
        self.corpora = list(corpora)
        self.seed = seed
        first = ConstantShares.of(shares) if isinstance(shares, Sequence) else shares
        self.stages = [Stage(0, sequence_length, first, metadata), *later]
        for stage in self.stages:
            for corpus in self.corpora if stage.metadata else ():
                corpus.check_metadata(stage.sequence_length)
        self.cursors = [Cursor() for _ in corpora]
        self.steps = 0
        """Taken since the begin of the run."""
        self._begin, self._begin_step = 0, 0
        """Tokens and steps of the run at which the counts of the cursors begin."""
        self._go_on()

    def copy(self) -> "Mixture":
        """A mixture that goes on from here by itself."""
        first, *later = self.stages
        other = Mixture(self.corpora, first.shares, self.seed, first.sequence_length, first.metadata, later)
        other.load_state_dict(self.state_dict())
        return other

    @property
    def total(self) -> int:
        """Tokens taken since the begin of the run."""
        return self._begin + sum(cursor.tokens for cursor in self.cursors)

    @property
    def stage(self) -> Stage:
        """The stage of the last step, or of the first one before it is taken."""
        return stage_at(self.stages, self._begin, self._begin_step)

    def _go_on(self) -> None:
        """Read from the cursors on, by the rules of the stage."""
        self._turns = Turns(self.stage.shares, self._begin)
        self._streams = [self._stream(source) for source in range(len(self.corpora))]
        self._ahead = [self._advance(source) for source in range(len(self.corpora))]

    def _stream(self, source: int) -> Iterator[Piece]:
        """Pieces of a source from its cursor on. The cursor stands at the piece that was yielded last."""
        cursor = self.cursors[source]
        corpus, stage = self.corpora[source], self.stage
        pieces = corpus.pieces(source, self.seed, stage.sequence_length, cursor.position, cursor.start, stage.metadata)
        for position, piece in pieces:
            cursor.position, cursor.start = position, piece.start
            yield piece

    def _advance(self, source: int) -> Piece:
        piece = next(self._streams[source])
        self._turns.offer(source, self.cursors[source].tokens, len(piece))
        return piece

    def take(self, most_tokens: int) -> list[Piece]:
        """The pieces of the next step: in order, until the next one would exceed ``most_tokens``."""
        if stage_at(self.stages, self.total, self.steps) != self.stage:
            self._count_anew()
            self._go_on()
        self.steps += 1
        pieces: list[Piece] = []
        room, counted = most_tokens, self.total - self._begin
        while len(piece := self._ahead[source := self._turns.next(counted)]) <= room:
            pieces.append(piece)
            room -= len(piece)
            counted += len(piece)
            self.cursors[source].tokens += len(piece)
            self._ahead[source] = self._advance(source)
        return pieces

    def _count_anew(self) -> None:
        self._begin, self._begin_step = self.total, self.steps
        for cursor in self.cursors:
            cursor.tokens = 0

    def epochs(self) -> dict[str, float]:
        """How often each source has been read, by name."""
        return {corpus.name: cursor.position / len(corpus) for corpus, cursor in zip(self.corpora, self.cursors, strict=True)}

    def expected_tokens(self, total: int) -> list[float]:
        """Tokens of each source in a run of ``total`` tokens."""
        return [expected_tokens(self.stages, source, total) for source in range(len(self.corpora))]

    def fingerprint(self) -> str:
        """Hash of everything that decides the order: the data, the shares, the split, the seed, the sequence length and the stages."""
        return self._fingerprint(self.stages)

    def _past(self) -> str:
        """Hash of what has decided the order so far: stages to come may be changed."""
        return self._fingerprint([stage for stage in self.stages if stage.has_begun(self._begin, self._begin_step)])

    def _fingerprint(self, stages: Sequence[Stage]) -> str:
        first, *later = stages
        alike = first.shares.shares if isinstance(first.shares, ConstantShares) else [None] * len(self.corpora)
        sources = [[c.name, c.fingerprint(), c.held_out, share] for c, share in zip(self.corpora, alike, strict=True)]
        values = [STATE_VERSION, self.seed, first.sequence_length, sources]
        if later or not first.metadata or not isinstance(first.shares, ConstantShares):
            values.append([{key: value for key, value in asdict(stage).items() if value is not None} for stage in stages])
        return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values: the fingerprint, steps, where counting began, and three integers for each source."""
        cursors = {corpus.name: asdict(cursor) for corpus, cursor in zip(self.corpora, self.cursors, strict=True)}
        counts = {"steps": self.steps, "begin": self._begin, "begin_step": self._begin_step}
        return {"version": STATE_VERSION, "fingerprint": self._past(), **counts, "cursors": cursors}

    def load_state_dict(self, state: dict[str, Any], allow_changed: bool = False) -> None:
        """As in ``Sampler``."""
        if "steps" not in state and any(stage.begin_step is not None for stage in self.stages):
            raise DataError("the checkpoint does not say how many steps were taken, which decide where stages with a share begin")
        self.steps, self._begin, self._begin_step = (state.get(key, 0) for key in ("steps", "begin", "begin_step"))
        changed = self._is_changed(state, self._past(), allow_changed)
        if changed:
            self._begin += sum(cursor["tokens"] for cursor in state["cursors"].values())
            self._begin_step = self.steps
        for corpus, cursor in zip(self.corpora, self.cursors, strict=True):
            saved = Cursor(**state["cursors"].get(corpus.name, {}))
            cursor.position = saved.position
            cursor.start = saved.start if not changed else 0
            cursor.tokens = saved.tokens if not changed else 0
        self._go_on()
