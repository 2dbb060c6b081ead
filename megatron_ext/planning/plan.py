"""The plan of one optimizer step: which ranks compute which documents, in which order."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.errors import ConfigError

FORMAT_VERSION = 1


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
    """Documents that are computed together by the ``degree`` ranks that begin at ``first_rank``."""

    first_rank: int
    degree: int
    slices: tuple[Slice, ...]

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
    """Packs of one step. A rank computes those whose block contains it, in the order of the list."""

    num_ranks: int
    packs: tuple[Pack, ...]

    def packs_of(self, rank: int) -> list[Pack]:
        """The packs that ``rank`` computes, in order."""
        return [pack for pack in self.packs if rank in pack.ranks]

    def rounds_of(self, rank: int, at_least: int = 0) -> list[Pack]:
        """As ``packs_of``, with as many packs for every rank: those without work get packs of no tokens.

        A pack of several ranks has the same place in the lists of all of them, so that ranks that go through the lists in step, as the
        stages of a pipeline do, meet in its collectives.

        Args:
            rank: whose list.
            at_least: fewest packs.
        """
        free = [0] * self.num_ranks
        places: list[int] = []
        for pack in self.packs:
            places.append(max(free[member] for member in pack.ranks))
            for member in pack.ranks:
                free[member] = places[-1] + 1
        mine = {place: pack for place, pack in zip(places, self.packs, strict=True) if rank in pack.ranks}
        return [mine.get(place, Pack(rank, 1, ())) for place in range(max([at_least, *free]))]

    def fill(self, tokens_per_pack: int) -> float:
        """Tokens of the plan as a share of the capacity of its packs."""
        capacity = sum(tokens_per_pack * pack.degree for pack in self.packs)
        return sum(pack.tokens for pack in self.packs) / capacity if capacity else 1.0

    def encode(self) -> np.ndarray:
        """The plan as one int32 array, to be sent to other ranks.

        Layout: version, ranks, packs; then first rank, degree, slices for each pack; then document, start, stop for each slice.
        """
        header = [FORMAT_VERSION, self.num_ranks, len(self.packs)]
        packs = [value for pack in self.packs for value in (pack.first_rank, pack.degree, len(pack.slices))]
        slices = [value for pack in self.packs for s in pack.slices for value in (s.document, s.start, s.stop)]
        return np.array(header + packs + slices, dtype=np.int32)

    @classmethod
    def decode(cls, encoded: np.ndarray) -> "Plan":
        """Inverse of :meth:`encode`. Raises ConfigError if the array is not a plan of this version."""
        if encoded.ndim != 1 or len(encoded) < 3 or encoded[0] != FORMAT_VERSION:
            seen = f"an array of shape {encoded.shape} that begins {encoded[:3]}"
            raise ConfigError(f"not an encoded plan of version {FORMAT_VERSION}: {seen}")
        num_ranks, num_packs = int(encoded[1]), int(encoded[2])
        packs_end = 3 + 3 * num_packs
        heads = encoded[3:packs_end].reshape(-1, 3) if 0 <= num_packs and packs_end <= len(encoded) else None
        if heads is None or (heads[:, 2] < 0).any() or len(encoded) != packs_end + 3 * int(heads[:, 2].sum(dtype=np.int64)):
            raise ConfigError(f"encoded plan is cut or garbled: {len(encoded)} numbers for {num_packs} packs")
        slices = [Slice(*row) for row in encoded[packs_end:].reshape(-1, 3).tolist()]
        packs, begin = [], 0
        for first_rank, degree, count in heads.tolist():
            packs.append(Pack(first_rank, degree, tuple(slices[begin : begin + count])))
            begin += count
        return cls(num_ranks, tuple(packs))

    def validate(self, lengths: Sequence[int], tokens_per_pack: int) -> None:
        """Check that every token of ``lengths`` is computed once and every pack fits.

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
