"""The plan of one optimizer step: which ranks compute which documents, in which order."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from megatron_ext.errors import ConfigError

IntArray = NDArray[np.int64]

FORMAT_VERSION = 2
MOST_RANKS = 2**20
"""That a plan may claim to be for."""
HEADER = 4
"""Numbers before the packs of an encoded plan."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Tokens ``start`` to ``stop`` (exclusive) of document number ``document`` of the step."""

    document: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
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

    def shard(self, place: int) -> "Shard":
        """What the rank at ``place`` of the block computes outside attention.

        Around a ring of r, documents are cut into 2 r chunks, of which ring rank j has numbers j and 2 r - 1 - j, so that each has as
        much causal attention to compute. Neighbours that divide the heads divide the ring rank's tokens in order.
        """
        neighbours = self.degree // self.ring
        chunks = tuple(tuple(_even_parts(len(piece), 2 * self.ring)) for piece in self.slices) if self.ring > 1 else ()
        pieces = list(self.slices)
        if self.ring > 1:
            numbers = (place // neighbours, 2 * self.ring - 1 - place // neighbours)
            pieces = [_chunk(piece, sizes, number) for piece, sizes in zip(self.slices, chunks, strict=True) for number in numbers]
        tokens = tuple(_even_parts(sum(map(len, pieces)), neighbours))
        begin = sum(tokens[: place % neighbours])
        return Shard(tuple(_cut(pieces, begin, begin + tokens[place % neighbours])), tokens, chunks)

    @property
    def ranks(self) -> range:
        """The block of ranks that computes the pack."""
        return range(self.first_rank, self.first_rank + self.degree)


@dataclass(frozen=True)
class Shard:
    """One rank's part of a pack."""

    slices: tuple[Slice, ...]
    """Its tokens, in order."""
    tokens: tuple[int, ...]
    """Number of tokens of each of the neighbours that divide the heads."""
    chunks: tuple[tuple[int, ...], ...]
    """Around a ring, for each document of the pack, the tokens of each of its chunks; empty without one."""


def _even_parts(total: int, parts: int) -> list[int]:
    share, more = divmod(total, parts)
    return [share + (part < more) for part in range(parts)]


def _chunk(piece: Slice, sizes: tuple[int, ...], number: int) -> Slice:
    start = piece.start + sum(sizes[:number])
    return Slice(piece.document, start, start + sizes[number])


def _cut(pieces: Sequence[Slice], begin: int, end: int) -> Iterator[Slice]:
    """Tokens ``begin`` to ``end`` of pieces laid end to end."""
    for piece in pieces:
        start, stop = max(begin, 0), min(end, len(piece))
        if start < stop:
            yield Slice(piece.document, piece.start + start, piece.start + stop)
        begin, end = begin - len(piece), end - len(piece)


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
        return encode_arrays(self.num_ranks, self.in_rounds, *self._arrays())

    def _arrays(self) -> tuple[IntArray, IntArray]:
        """First rank, degree, ring, slices of each pack ([packs, 4]); document, start, stop of each slice ([slices, 3])."""
        slices = [piece for pack in self.packs for piece in pack.slices]
        heads = [[pack.first_rank for pack in self.packs], [pack.degree for pack in self.packs], [pack.ring for pack in self.packs]]
        counts = [len(pack.slices) for pack in self.packs]
        columns = [[piece.document for piece in slices], [piece.start for piece in slices], [piece.stop for piece in slices]]
        return np.array([*heads, counts], dtype=np.int64).T, np.array(columns, dtype=np.int64).T

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
        bounds = encoded[packs_end:].reshape(-1, 3)
        if in_rounds > 1 or not 1 <= num_ranks <= MOST_RANKS or (encoded < 0).any() or (bounds[:, 1] > bounds[:, 2]).any():
            raise ConfigError(
                f"encoded plan is garbled: {num_ranks} ranks, of at most {MOST_RANKS}; numbers below 0, or a slice that ends first"
            )
        with _collector_paused():
            slices = [*map(Slice, *(column.tolist() for column in bounds.T))]
            ends = np.cumsum(heads[:, 3])
            parts = [tuple(slices[begin:end]) for begin, end in zip((ends - heads[:, 3]).tolist(), ends.tolist(), strict=True)]
            packs = tuple(map(Pack, heads[:, 0].tolist(), heads[:, 1].tolist(), parts, heads[:, 2].tolist()))
        return cls(num_ranks, packs, bool(in_rounds))

    def validate(self, lengths: Sequence[int], tokens_per_pack: int) -> None:
        """Check that every token of ``lengths`` is computed once, every pack fits, and rounds are whole.

        Raises ConfigError naming the first document or pack that is wrong.
        """
        heads, slices = self._arrays()
        wrong = _wrong_packs(heads, slices, self.num_ranks, len(lengths), tokens_per_pack)
        if wrong.any():
            self._refuse_pack(int(wrong.argmax()), len(lengths), tokens_per_pack)
        if self.in_rounds and not _rounds_are_whole(heads, self.num_ranks):
            self._refuse_rounds()
        wrong = _wrong_documents(slices, np.asarray(lengths, dtype=np.int64))
        if wrong.any():
            self._refuse_document(int(wrong.argmax()), lengths)

    def _refuse_pack(self, number: int, documents: int, tokens_per_pack: int) -> NoReturn:
        pack = self.packs[number]
        power_of_two = pack.degree > 0 and pack.degree & (pack.degree - 1) == 0
        if not power_of_two or pack.first_rank % pack.degree or not 0 <= pack.first_rank <= self.num_ranks - pack.degree:
            ranks = f"ranks {pack.first_rank} to {pack.first_rank + pack.degree - 1}"
            raise ConfigError(f"pack {number}: {ranks} are not an aligned power-of-two block of {self.num_ranks}")
        if pack.ring < 1 or pack.degree % pack.ring:
            raise ConfigError(f"pack {number}: a ring of {pack.ring} does not divide {pack.degree} ranks")
        if pack.tokens > tokens_per_pack * pack.degree:
            raise ConfigError(f"pack {number} has {pack.tokens} tokens; {pack.degree} ranks hold {tokens_per_pack * pack.degree}")
        unknown = next(piece.document for piece in pack.slices if not 0 <= piece.document < documents)
        raise ConfigError(f"pack {number} names document {unknown}; the step has {documents}")

    def _refuse_document(self, document: int, lengths: Sequence[int]) -> NoReturn:
        pieces = sorted((piece.start, piece.stop) for pack in self.packs for piece in pack.slices if piece.document == document)
        position = 0
        for start, stop in pieces:
            if start != position or stop <= start:
                first, last = min(start, position), max(start, position)
                raise ConfigError(f"document {document}: tokens {first} to {last} are not computed exactly once")
            position = stop
        raise ConfigError(f"document {document}: {position} of {lengths[document]} tokens are computed")

    def _refuse_rounds(self) -> NoReturn:
        done = np.zeros(self.num_ranks, dtype=int)
        for number, pack in enumerate(self.packs):
            block = done[pack.first_rank : pack.first_rank + pack.degree]
            if (block != done.min()).any():
                raise ConfigError(f"pack {number}: its ranks are not all in round {done.min()}")
            block += 1
        raise ConfigError(f"rank {done.argmin()} has no pack in round {done.min()}")


@contextmanager
def _collector_paused() -> Iterator[None]:
    """For making many objects that stay: the garbage collector would walk all of them again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def encode_arrays(num_ranks: int, in_rounds: bool, heads: IntArray, slices: IntArray) -> NDArray[np.int32]:
    """What :meth:`Plan.encode` returns, from the arrays that it consists of.

    Args:
        num_ranks: of the plan.
        in_rounds: of the plan.
        heads: first rank, degree, ring and number of slices of each pack, [packs, 4].
        slices: document, start and stop of each slice, pack after pack, [slices, 3].
    """
    header = np.array([FORMAT_VERSION, num_ranks, int(in_rounds), len(heads)])
    return np.concatenate([header, heads.ravel(), slices.ravel()]).astype(np.int32)


def is_whole(num_ranks: int, in_rounds: bool, heads: IntArray, slices: IntArray, lengths: IntArray, tokens_per_pack: int) -> bool:
    """Whether the plan of these arrays (see :func:`encode_arrays`) passes :meth:`Plan.validate`; no objects are made or read."""
    if _wrong_packs(heads, slices, num_ranks, len(lengths), tokens_per_pack).any():
        return False
    return (not in_rounds or _rounds_are_whole(heads, num_ranks)) and not _wrong_documents(slices, lengths).any()


def _wrong_packs(heads: IntArray, slices: IntArray, num_ranks: int, documents: int, tokens_per_pack: int) -> NDArray[np.bool_]:
    """Which packs are no aligned block, have a wrong ring, too many tokens or documents that the step does not have."""
    first, degree, ring, count = heads.T
    block = (degree <= 0) | (degree & (degree - 1) != 0) | (first < 0) | (first + degree > num_ranks)
    block |= first % np.maximum(degree, 1) != 0
    owner = np.repeat(np.arange(len(heads)), count)
    tokens = np.zeros(len(heads), dtype=np.int64)
    np.add.at(tokens, owner, slices[:, 2] - slices[:, 1])
    unknown = np.zeros(len(heads), dtype=bool)
    unknown[owner[(slices[:, 0] < 0) | (slices[:, 0] >= documents)]] = True
    return block | (ring < 1) | (degree % np.maximum(ring, 1) != 0) | (tokens > tokens_per_pack * degree) | unknown


def _wrong_documents(slices: IntArray, lengths: IntArray) -> NDArray[np.bool_]:
    """Which documents have tokens that are not computed exactly once."""
    document, start, stop = slices[np.lexsort((slices[:, 1], slices[:, 0]))].T
    begins = np.ones(len(document), dtype=bool)
    begins[1:] = document[1:] != document[:-1]
    before = np.where(begins, 0, np.roll(stop, 1))
    wrong, position = np.zeros(len(lengths), dtype=bool), np.zeros(len(lengths), dtype=np.int64)
    wrong[document[(start != before) | (stop <= start)]] = True
    position[document] = stop  # the last slice of a document is written last
    return wrong | (position != lengths)


def _rounds_are_whole(heads: IntArray, num_ranks: int) -> bool:
    """Whether the list goes round by round, each covering every rank once."""
    first, degree = heads[:, 0], heads[:, 1]
    before = np.cumsum(degree) - degree
    if degree.sum() % num_ranks or (before % num_ranks + degree > num_ranks).any():
        return False
    begin = before // num_ranks * num_ranks + first
    order = np.argsort(begin, kind="stable")
    return bool((begin[order] == np.cumsum(degree[order]) - degree[order]).all())
