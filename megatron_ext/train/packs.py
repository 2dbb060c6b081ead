"""The packs that a rank computes, read one at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_ext.data.batch import PackedBatch, read_pack
from megatron_ext.data.corpus import Corpus, Piece
from megatron_ext.data.loss_weights import LossWeights
from megatron_ext.parallel.grid import Grid
from megatron_ext.parallel.sequence import Sharing
from megatron_ext.planning import Pack


class Packs(Protocol):
    """Batches whose number is known before they are read; a list is one."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[PackedBatch]: ...


@dataclass(frozen=True)
class PlannedPacks:
    """Packs of a plan as batches. Their number is known; each is read when its turn comes."""

    packs: Sequence[Pack]
    pieces: Sequence[Piece]
    """The pieces that the packs refer to."""
    corpora: Sequence[Corpus]
    """The sources that the pieces refer to."""
    vocab_size: int
    rank: int
    """Of the data ranks, the one that reads."""
    weights: LossWeights | None = None
    """Of the losses; None: 1."""

    def __len__(self) -> int:
        return len(self.packs)

    def __iter__(self) -> Iterator[PackedBatch]:
        return map(self._read, self.packs)

    def _read(self, pack: Pack) -> PackedBatch:
        return read_pack(pack, self.pieces, self.corpora, self.vocab_size, self.rank - pack.first_rank, self.weights)


@dataclass(frozen=True)
class ChangedPacks:
    """Other packs, each changed when it is read."""

    packs: Packs
    change: Callable[[PackedBatch], PackedBatch]

    def __len__(self) -> int:
        return len(self.packs)

    def __iter__(self) -> Iterator[PackedBatch]:
        return map(self.change, self.packs)


def sharing_of(batch: PackedBatch, grid: Grid) -> Sharing | None:
    """The ranks that this rank shares a pack with. Their groups exist: ``Engine.packs_of`` made them."""
    if not batch.shard_tokens:
        return None
    ring = len(batch.chunks[0]) // 2 if batch.chunks else 1
    heads = grid.block(len(batch.shard_tokens))
    around = grid.ring(ring * len(batch.shard_tokens), ring) if ring > 1 else None
    assert heads is not None, "plans are made of whole blocks"
    return Sharing(heads, batch.shard_tokens, around, batch.chunks)
