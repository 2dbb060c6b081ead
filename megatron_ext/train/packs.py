"""The packs that a rank computes, read one at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_ext.data.batch import PackedBatch, read_pack
from megatron_ext.data.corpus import Corpus, Piece
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

    def __len__(self) -> int:
        return len(self.packs)

    def __iter__(self) -> Iterator[PackedBatch]:
        return (read_pack(pack, self.pieces, self.corpora, self.vocab_size) for pack in self.packs)
