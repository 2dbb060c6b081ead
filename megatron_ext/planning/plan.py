"""The plan of one optimizer step: which ranks compute which documents, in which order."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.errors import ConfigError

FORMAT_VERSION = 2
HEADER = 4
"""Numbers before the packs of an encoded plan."""


@dataclass(frozen=True)
class Slice:
    """Tokens ``start`` to ``stop`` (exclusive) of document number ``document`` of the step."""

    document: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Pack:
    """Documents that are computed together by the ``degree`` ranks that begin at ``first_rank``.

    The ranks divide the heads of attention among ``degree / ring`` neighbours, and pass keys and values around ``ring`` ranks.
    """

    first_rank: int
    degree: int
    slices: tuple[Slice, ...]
    ring: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of the pack, over all its ranks."""
        return sum(len(piece) for piece in self.slices)

    @property
    def ranks(self) -> range:
        """The block of ranks that computes the pack."""
        return range(self.first_rank, self.first_rank + self.degree)


@dataclass(frozen=True)
class Plan:
    """Packs of one step. A rank computes those whose block contains it, in the order of the list.

    The order is the same for all ranks, so that ranks that share packs meet in their collectives in one order, whatever the blocks.
    """

    num_ranks: int
    packs: tuple[Pack, ...]
    in_rounds: bool = False
    """The list goes round by round, and each rank computes one pack of every round. Ranks that wait for each other between packs, as
    the stages of a pipeline and ranks that gather parameters do, need it."""

    def packs_of(self, rank: int) -> list[Pack]:
        """The packs that ``rank`` computes, in order."""
        return [pack for pack in self.packs if rank in pack.ranks]

    def by_rounds(self, at_least: int = 0) -> "Plan":
        """The plan in rounds: each pack in the first that its ranks are free in, ranks without work given packs of no tokens.

        Args:
            at_least: fewest rounds.
        """
        if self.in_rounds and len(self.packs_of(0)) >= at_least:
            return self
        free = np.zeros(self.num_ranks, dtype=int)
        rounds: list[list[Pack]] = [[] for _ in range(at_least)]
        for pack in self.packs:
            block = slice(pack.first_rank, pack.first_rank + pack.degree)
            place = int(free[block].max())
            free[block] = place + 1
            rounds += [[] for _ in range(place + 1 - len(rounds))]
            rounds[place].append(pack)
        packs: list[Pack] = []
        for each in rounds:
            idle = set(range(self.num_ranks)).difference(*(pack.ranks for pack in each))
            packs += sorted([*each, *(Pack(rank, 1, ()) for rank in idle)], key=lambda pack: pack.first_rank)
        return Plan(self.num_ranks, tuple(packs), in_rounds=True)

    def fill(self, tokens_per_pack: int) -> float:
        """Tokens of the plan as a share of the capacity of its packs."""
        capacity = sum(tokens_per_pack * pack.degree for pack in self.packs)
        return sum(pack.tokens for pack in self.packs) / capacity if capacity else 1.0

    def encode(self) -> np.ndarray:
        """The plan as one int32 array, to be sent to other ranks.

        Layout: version, ranks, 1 for rounds, packs; then first rank, degree, ring, slices for each pack; then document, start, stop for
        each slice.
        """
        header = [FORMAT_VERSION, self.num_ranks, int(self.in_rounds), len(self.packs)]
        packs = [value for pack in self.packs for value in (pack.first_rank, pack.degree, pack.ring, len(pack.slices))]
        slices = [value for pack in self.packs for s in pack.slices for value in (s.document, s.start, s.stop)]
        return np.array(header + packs + slices, dtype=np.int32)

    @classmethod
    def decode(cls, encoded: np.ndarray) -> "Plan":
        """Inverse of :meth:`encode`. Raises ConfigError if the array is not a plan of this version."""
        if encoded.ndim != 1 or len(encoded) < HEADER or encoded[0] != FORMAT_VERSION:
            seen = f"an array of shape {encoded.shape} that begins {encoded[:HEADER]}"
            raise ConfigError(f"not an encoded plan of version {FORMAT_VERSION}: {seen}")
        num_ranks, in_rounds, num_packs = encoded[1:HEADER].tolist()
        packs_end = HEADER + 4 * num_packs
        heads = encoded[HEADER:packs_end].reshape(-1, 4) if 0 <= num_packs and packs_end <= len(encoded) else None
        if heads is None or (heads[:, 3] < 0).any() or len(encoded) != packs_end + 3 * int(heads[:, 3].sum(dtype=np.int64)):
            raise ConfigError(f"encoded plan is cut or garbled: {len(encoded)} numbers for {num_packs} packs")
        slices = [Slice(*row) for row in encoded[packs_end:].reshape(-1, 3).tolist()]
        packs, begin = [], 0
        for first_rank, degree, ring, count in heads.tolist():
            packs.append(Pack(first_rank, degree, tuple(slices[begin : begin + count]), ring))
            begin += count
        return cls(num_ranks, tuple(packs), bool(in_rounds))

    def validate(self, lengths: Sequence[int], tokens_per_pack: int) -> None:
        """Check that every token of ``lengths`` is computed once, every pack fits, and rounds are whole.

        Raises ConfigError naming the first document or pack that is wrong.
        """
        covered: list[list[tuple[int, int]]] = [[] for _ in lengths]
        for number, pack in enumerate(self.packs):
            self._validate_block(number, pack)
            if pack.tokens > tokens_per_pack * pack.degree:
                raise ConfigError(f"pack {number} has {pack.tokens} tokens; {pack.degree} ranks hold {tokens_per_pack * pack.degree}")
            for piece in pack.slices:
                if not 0 <= piece.document < len(lengths):
                    raise ConfigError(f"pack {number} names document {piece.document}; the step has {len(lengths)}")
                covered[piece.document].append((piece.start, piece.stop))
        if self.in_rounds:
            self._validate_rounds()
        for document, (length, pieces) in enumerate(zip(lengths, covered, strict=True)):
            position = 0
            for start, stop in sorted(pieces):
                if start != position or stop <= start:
                    first, last = min(start, position), max(start, position)
                    raise ConfigError(f"document {document}: tokens {first} to {last} are not computed exactly once")
                position = stop
            if position != length:
                raise ConfigError(f"document {document}: {position} of {length} tokens are computed")

    def _validate_block(self, number: int, pack: Pack) -> None:
        power_of_two = pack.degree > 0 and pack.degree & (pack.degree - 1) == 0
        if not power_of_two or pack.first_rank % pack.degree or not 0 <= pack.first_rank <= self.num_ranks - pack.degree:
            ranks = f"ranks {pack.first_rank} to {pack.first_rank + pack.degree - 1}"
            raise ConfigError(f"pack {number}: {ranks} are not an aligned power-of-two block of {self.num_ranks}")
        if pack.ring < 1 or pack.degree % pack.ring:
            raise ConfigError(f"pack {number}: a ring of {pack.ring} does not divide {pack.degree} ranks")

    def _validate_rounds(self) -> None:
        done = np.zeros(self.num_ranks, dtype=int)
        for number, pack in enumerate(self.packs):
            block = done[pack.first_rank : pack.first_rank + pack.degree]
            if (block != done.min()).any():
                raise ConfigError(f"pack {number}: its ranks are not all in round {done.min()}")
            block += 1
        if (done != done[0]).any():
            raise ConfigError(f"rank {done.argmin()} has no pack in round {done.min()}")
