"""Steps of pieces of one length each: Dataset Decomposition with a length curriculum."""

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_ext.data.corpus import Corpus, Piece
from megatron_ext.data.decomposition import Bucket, sizes
from megatron_ext.data.length_curriculum import Curriculum, CycleShares, odds
from megatron_ext.data.mixture import Mixture
from megatron_ext.data.sampler import Sampler
from megatron_ext.data.shares import ConstantShares, Turns
from megatron_ext.data.stages import Stage
from megatron_ext.errors import ConfigError

STATE_VERSION = 1


class DecomposedMixture(Sampler):
    """Documents of several corpora in pieces of powers of two, each step of pieces of one length.

    Documents are cut by the binary decomposition of their lengths, and pieces of one length make a bucket. A step takes all its pieces
    from one bucket: of the buckets whose turn it could be, by the curriculum, the one that is due first (see ``Turns``). So the tokens of
    every bucket are what the curriculum owes it to within one step, the tokens of every source within a bucket its share to within one
    piece, and every piece is read once an epoch of its bucket (Pouransari et al. 2024, arXiv:2405.13226; there buckets are drawn at
    random).

    Args:
        corpora: the sources.
        shares: share of the tokens of each source; they are normalized.
        seed: chooses the order.
        sequence_length: tokens of the longest pieces, a power of two.
        smallest: tokens of the shortest pieces of a bucket, a power of two. What is left of a document is one shorter piece.
        curriculum: which lengths come first in a cycle.
        cycle_tokens: tokens of a cycle, in which every bucket has its share of the tokens of the data.

    Raises:
        ConfigError: a source has metadata, or an order by scores.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        shares: Sequence[float],
        seed: int,
        sequence_length: int,
        smallest: int,
        curriculum: Curriculum,
        cycle_tokens: int,
    ) -> None:
        self.corpora = list(corpora)
        for corpus in self.corpora:
            if corpus.metadata is not None or corpus.is_sorted:
                raise ConfigError(
                    f"source {corpus.name!r} has {'an order by scores' if corpus.is_sorted else 'metadata'}; accepted with "
                    "data.decomposition: sources in random order without metadata"
                )
        self._seed, self._smallest = seed, smallest
        of_sources = ConstantShares.of(shares)
        self.stages = [Stage(0, sequence_length, of_sources)]
        self._buckets: dict[int, dict[int, Bucket]] = {}
        """By size, then by number of the source."""
        for size in sizes(smallest, sequence_length):
            buckets = {source: Bucket(corpus, size, smallest, sequence_length) for source, corpus in enumerate(self.corpora)}
            if filled := {source: bucket for source, bucket in buckets.items() if bucket.trains}:
                self._buckets[size] = filled
        for source, corpus in enumerate(self.corpora):
            if not any(source in filled for filled in self._buckets.values()):
                corpus.check_side(corpus.training_lengths()[0])
        owed = {size: [self._share(source, bucket) for source, bucket in each.items()] for size, each in self._buckets.items()}
        by_size = tuple(sum(each) / sum(map(sum, owed.values())) for each in owed.values())
        self._shares = CycleShares(by_size, odds(curriculum, by_size), cycle_tokens)
        self._mixtures = {
            size: Mixture(list(each.values()), owed[size], seed, max(size, smallest - 1), metadata=False)
            for size, each in self._buckets.items()
        }
        self._begins = dict.fromkeys(self._mixtures, 0)
        """Tokens of each bucket at which counting for the curriculum begins."""

    def _share(self, source: int, bucket: Bucket) -> float:
        """Of all tokens, the share that a source has in a bucket."""
        return self._shares_of_sources[source] * bucket.num_tokens / self.corpora[source].num_tokens

    @property
    def _shares_of_sources(self) -> tuple[float, ...]:
        shares = self.stage.shares
        assert isinstance(shares, ConstantShares), "of the only stage"
        return shares.shares

    @property
    def stage(self) -> Stage:
        """As in ``Sampler``: there is one."""
        return self.stages[0]

    def copy(self) -> "DecomposedMixture":
        """As in ``Sampler``."""
        other = copy.copy(self)
        other._mixtures = {size: mixture.copy() for size, mixture in self._mixtures.items()}
        other._begins = dict(self._begins)
        return other

    def take(self, most_tokens: int) -> list[Piece]:
        """As in ``Sampler``: pieces of one bucket."""
        turns, taken = Turns(self._shares, 0), {size: mixture.total - self._begins[size] for size, mixture in self._mixtures.items()}
        for number, tokens in enumerate(taken.values()):
            turns.offer(number, tokens, most_tokens)
        size = list(taken)[turns.next(sum(taken.values()))]
        numbers = list(self._buckets[size])
        return [replace(piece, source=numbers[piece.source]) for piece in self._mixtures[size].take(most_tokens)]

    def epochs(self) -> dict[str, float]:
        """As in ``Sampler``: the mean over the tokens of a source, whose buckets need not be equally far."""
        read = {corpus.name: 0.0 for corpus in self.corpora}
        for size, mixture in self._mixtures.items():
            epochs = mixture.epochs()
            for source, bucket in self._buckets[size].items():
                name = self.corpora[source].name
                read[name] += epochs[name] * bucket.num_tokens / self.corpora[source].num_tokens
        return read

    def expected_tokens(self, total: int) -> list[float]:
        """As in ``Sampler``, over whole cycles."""
        return [share * total for share in self._shares_of_sources]

    def fingerprint(self) -> str:
        """As in ``Sampler``."""
        sources = [[c.name, c.fingerprint(), c.held_out, share] for c, share in zip(self.corpora, self._shares_of_sources, strict=True)]
        rules = [self.stage.sequence_length, self._smallest, self._shares.odds, self._shares.cycle_tokens]
        text = json.dumps(["decomposed", STATE_VERSION, self._seed, rules, sources])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """As in ``Sampler``: four integers for each source in each bucket."""
        buckets = {str(size): mixture.state_dict() for size, mixture in self._mixtures.items()}
        begins = {str(size): begin for size, begin in self._begins.items()}
        total, steps = (sum(each) for each in zip(*((mixture.total, mixture.steps) for mixture in self._mixtures.values()), strict=True))
        # A mixture without decomposition, if a run goes on with one, has no cursors and begins to count here.
        plain = {"steps": steps, "begin": total, "begin_step": steps, "cursors": {}}
        return {"version": STATE_VERSION, "fingerprint": self.fingerprint(), **plain, "begins": begins, "buckets": buckets}

    def load_state_dict(self, state: dict[str, Any], allow_changed: bool = False) -> None:
        """As in ``Sampler``. With changed data each bucket goes on where it was, those that were not there begin, and so does a cycle."""
        changed = self._is_changed(state, self.fingerprint(), allow_changed)
        for size, mixture in self._mixtures.items():
            if str(size) in state.get("buckets", {}):
                mixture.load_state_dict(state["buckets"][str(size)], allow_changed)
            self._begins[size] = mixture.total if changed else state["begins"][str(size)]
