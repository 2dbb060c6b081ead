"""From the slices that a plan gives to this rank to the tensors that the model reads."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from megatron_ext.data.corpus import Corpus, Piece
from megatron_ext.data.loss_weights import LossWeights
from megatron_ext.errors import DataError
from megatron_ext.planning import Pack


@dataclass(frozen=True)
class PackedBatch:
    """Documents one after another, without padding: this rank's T tokens of a pack of D documents."""

    tokens: torch.Tensor
    """int64 [T]."""
    labels: torch.Tensor
    """int64 [T]: the next token of the same document; 0 where there is none, with loss weight 0."""
    positions: torch.Tensor
    """int32 [T]: restart at 0 at each document."""
    cu_seqlens: torch.Tensor
    """int32 [D + 1]: where the documents begin and end in the whole pack."""
    loss_weight: torch.Tensor
    """float32 [T]."""
    sources: torch.Tensor
    """int64 [T]: number of the source that each token comes from."""
    max_seqlen: int
    """Tokens of the longest document."""
    shard_tokens: tuple[int, ...] = ()
    """Tokens of each of the ranks that divide the heads of the pack; empty: this rank has them all."""
    chunks: tuple[tuple[int, ...], ...] = ()
    """Around a ring, for each document, the tokens of each of its chunks."""

    def to(self, device: torch.device) -> "PackedBatch":
        """The batch on ``device``."""
        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return PackedBatch(**{k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in moved.items()})

    @property
    def model_inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor, torch.Tensor]:
        """What ``GPT.forward`` takes, in order, but for who shares the pack."""
        return self.tokens, self.positions, self.cu_seqlens, self.max_seqlen, self.labels, self.loss_weight


def read_pack(
    pack: Pack,
    pieces: Sequence[Piece],
    corpora: Sequence[Corpus],
    vocab_size: int,
    place: int = 0,
    weights: LossWeights | None = None,
) -> PackedBatch:
    """Read one rank's part of the documents of one pack from disk.

    Args:
        pack: slices that refer to ``pieces``.
        place: of the rank in the pack's block.
        pieces: the pieces of the step.
        corpora: the sources that the pieces refer to.
        vocab_size: rows of the embedding.
        weights: of the losses; None: 1.

    Raises:
        DataError: a token is not in the vocabulary, with the file and the document.
    """
    lengths = [len(piece) for piece in pack.slices]
    shard = pack.shard(place)
    ends = np.cumsum([0, *(len(part) for part in shard.slices)])
    total = int(ends[-1])
    tokens, labels, positions, sources = (np.zeros(total, dtype=np.int64) for _ in range(4))
    loss_weight = np.zeros(total, dtype=np.float32)
    for begin, end, part in zip(ends[:-1], ends[1:], shard.slices, strict=True):
        piece = pieces[part.document]
        labelled = part.stop < len(piece) or piece.has_next
        read = _read(corpora[piece.source], piece, part.start, part.stop + labelled, vocab_size)
        count = end - begin
        tokens[begin:end] = read[:count]
        labels[begin : begin + len(read) - 1] = read[1:]
        first = piece.start - piece.prefix + part.start + 1  # token of the document that is predicted first; before 0 lie metadata
        masked = max(0, min(piece.first_predicted - first, len(read) - 1))
        predicted = slice(first + masked, first + len(read) - 1)
        weight = 1.0 if weights is None else weights.of(part.document, piece, predicted)
        loss_weight[begin + masked : begin + len(read) - 1] = weight
        positions[begin:end] = np.arange(part.start, part.stop)
        sources[begin:end] = piece.source
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions.astype(np.int32)),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)),
        loss_weight=torch.from_numpy(loss_weight),
        sources=torch.from_numpy(sources),
        max_seqlen=max(lengths, default=0),
        shard_tokens=shard.tokens if pack.degree > 1 else (),
        chunks=shard.chunks,
    )


def _read(corpus: Corpus, piece: Piece, start: int, stop: int, vocab_size: int) -> np.ndarray:
    """Tokens ``start`` to ``stop`` of a piece; ``stop`` may be one beyond it."""
    first = piece.start - piece.prefix
    inside = slice(max(first + start, piece.start), max(first + stop, piece.start))
    tokens = corpus.tokens(piece.document, inside.start, inside.stop)
    _check_vocabulary(tokens, f"{corpus.path}.bin", piece.document, vocab_size)
    if start >= piece.prefix:
        return tokens
    assert corpus.metadata is not None, "the piece has some"
    before = corpus.metadata.tokens(piece.document, start, min(stop, piece.prefix))
    _check_vocabulary(before, str(corpus.metadata.bin_path), piece.document, vocab_size)
    return np.concatenate((before.astype(np.int64), tokens))


def _check_vocabulary(tokens: np.ndarray, path: str, document: int, vocab_size: int) -> None:
    if len(tokens) and not (0 <= int(tokens.min()) and int(tokens.max()) < vocab_size):
        worst = int(tokens.max()) if int(tokens.max()) >= vocab_size else int(tokens.min())
        raise DataError(
            f"{path}, document {document}: token {worst} is outside the model's vocabulary of {vocab_size}; "
            "the corpus was made with another tokenizer"
        )
