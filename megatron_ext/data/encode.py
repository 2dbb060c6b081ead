"""The work of a preprocessing process: a block of raw input in, token ids out."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_ext.data.blocks import Block, Fault
from megatron_ext.data.tokenizer import Tokenizer


@dataclass
class EncodedTexts:
    """The documents of one key of a block."""

    tokens: np.ndarray
    """Ids of all documents one after the other, [sum(lengths)]."""
    lengths: np.ndarray
    """int64 [documents]."""
    empty: int
    """Documents without text, which are dropped."""
    num_bytes: int
    """UTF-8 bytes of the texts."""


@dataclass
class EncodedBlock:
    """What became of a block."""

    size: int
    """Bytes of input that the block stands for."""
    texts: list[EncodedTexts] = field(default_factory=list)
    """By key."""
    faults: list[Fault] = field(default_factory=list)


@dataclass(frozen=True)
class BlockEncoder:
    """Parse and tokenize blocks.

    Args:
        tokenizer: sent along to the processes that call this.
        keys: fields of a record, each of which becomes a text of its own.
        append_eod: end each document with the tokenizer's end-of-document token.
    """

    tokenizer: Tokenizer
    keys: Sequence[str]
    append_eod: bool

    def __call__(self, block: Block) -> EncodedBlock:
        result = EncodedBlock(block.size)
        columns: list[list[str]] = [[] for _ in self.keys]
        for document in block.documents(self.keys):
            if isinstance(document, Fault):
                result.faults.append(document)
                continue
            for column, text in zip(columns, document, strict=True):
                column.append(text)
        result.texts = [self._encode(column) for column in columns]
        return result

    def _encode(self, texts: list[str]) -> EncodedTexts:
        """Texts of nothing but white space are empty."""
        kept = [text for text in texts if text and not text.isspace()]
        documents = self.tokenizer.encode_batch(kept)
        if self.append_eod:
            eod = np.array([self.tokenizer.eod_id], dtype=self.tokenizer.dtype)
            documents = [np.concatenate((document, eod)) for document in documents]
        return EncodedTexts(
            tokens=np.concatenate([np.empty(0, self.tokenizer.dtype), *documents]),
            lengths=np.array([len(document) for document in documents], dtype=np.int64),
            empty=len(texts) - len(kept),
            num_bytes=sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text in kept),
        )
