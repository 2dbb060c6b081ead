"""The work of a preprocessing process: a block of raw input in, token ids out."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_ext.data.blocks import Block, Fault
from megatron_ext.data.metadata import MetadataTemplate
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
    metadata: tuple[np.ndarray, np.ndarray] | None = None
    """Tokens and lengths, as above, of the rows of metadata."""


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
        metadata: template of a row of tokens for each document.
    """

    tokenizer: Tokenizer
    keys: Sequence[str]
    append_eod: bool
    metadata: MetadataTemplate | None = None

    @property
    def fields(self) -> list[str]:
        """The fields that are read of each record."""
        return [*self.keys, *(self.metadata.fields if self.metadata else ())]

    def __call__(self, block: Block) -> EncodedBlock:
        result = EncodedBlock(block.size)
        columns: list[list[str]] = [[] for _ in self.keys]
        prefixes: list[str] = []
        for document in block.documents(self.fields):
            if isinstance(document, Fault):
                result.faults.append(document)
                continue
            for column, text in zip(columns, document, strict=False):
                column.append(text)
            prefixes.append(self.metadata.fill(document[len(self.keys) :]) if self.metadata else "")
        result.texts = [self._encode(column, prefixes) for column in columns]
        return result

    def _encode(self, texts: list[str], prefixes: list[str]) -> EncodedTexts:
        """Texts of nothing but white space are empty."""
        kept = [text for text in texts if _has_text(text)]
        documents = self.tokenizer.encode_batch(kept)
        if self.append_eod:
            eod = np.array([self.tokenizer.eod_id], dtype=self.tokenizer.dtype)
            documents = [np.concatenate((document, eod)) for document in documents]
        return EncodedTexts(
            *self._joined(documents),
            empty=len(texts) - len(kept),
            num_bytes=sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text in kept),
            metadata=self._rows([prefix for text, prefix in zip(texts, prefixes, strict=True) if _has_text(text)]),
        )

    def _rows(self, prefixes: list[str]) -> tuple[np.ndarray, np.ndarray] | None:
        return None if self.metadata is None else self._joined(self.tokenizer.encode_batch(prefixes))

    def _joined(self, documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of all documents one after the other, and how many each has."""
        tokens = np.concatenate([np.empty(0, self.tokenizer.dtype), *documents])
        return tokens, np.array([len(document) for document in documents], dtype=np.int64)


def _has_text(text: str) -> bool:
    return bool(text) and not text.isspace()
