"""Validation tokens for one process, without a run: from a .bin/.idx pair, or from text and the tokenizer of a checkpoint."""

import tempfile
from pathlib import Path

from megatron_ext.data.batch import PackedBatch, read_pack
from megatron_ext.data.indexed import index_path
from megatron_ext.data.options import DataOptions, SourceOptions
from megatron_ext.data.preprocess import preprocess
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.data.validation import ValidationSet, validation_sets
from megatron_ext.errors import DataError
from megatron_ext.planning.packing import best_fit_decreasing
from megatron_ext.planning.plan import Pack, Slice


def evaluation_packs(data: str, tokenizer: Path, sequence_length: int, most_tokens: int, vocab_size: int) -> list[PackedBatch]:
    """Documents chosen at random, but always the same, in packs of at most ``sequence_length`` tokens.

    Args:
        data: prefix of a .bin/.idx pair, or a file or folder of text that ``read_documents`` takes.
        tokenizer: folder of the tokenizer for text; not touched for a pair.
        sequence_length: tokens of the longest piece of a document that attends to itself.
        most_tokens: no further document is taken once there are so many.
        vocab_size: rows of the embedding.

    Raises:
        DataError: there is neither, it cannot be read, or its tokens are not in the vocabulary.
    """
    name = Path(data).name
    if index_path(data).is_file():
        return _packs(name, data, sequence_length, most_tokens, vocab_size)
    if not Path(data).exists():
        raise DataError(f"{data}: accepted are the prefix of a .bin/.idx pair, and a file or folder of text; there is neither")
    with tempfile.TemporaryDirectory() as folder:
        summary = preprocess([data], load_tokenizer(tokenizer), Path(folder) / "text")
        return _packs(name, summary.keys["text"].prefix, sequence_length, most_tokens, vocab_size)


def validation_packs(data: DataOptions, most_tokens: int, vocab_size: int) -> dict[str, list[PackedBatch]]:
    """The documents of each corpus of ``data.validation`` that a run with these options evaluates, in packs of at most a whole sequence.

    Args:
        data: the data section of the run.
        most_tokens: ``evaluation.tokens`` of the run.
        vocab_size: rows of the embedding.

    Raises:
        DataError: a corpus cannot be read, or its tokens are not in the vocabulary.
    """
    return {each.name: _packed(each, data.longest_sequence, vocab_size) for each in validation_sets(data, [], most_tokens)}


def _packs(name: str, prefix: str, sequence_length: int, most_tokens: int, vocab_size: int) -> list[PackedBatch]:
    source = SourceOptions(name=name, path=prefix)
    options = DataOptions(sources=[source], sequence_length=sequence_length, tokens_per_step=sequence_length, validation=[source])
    return validation_packs(options, most_tokens, vocab_size)[name]


def _packed(chosen: ValidationSet, sequence_length: int, vocab_size: int) -> list[PackedBatch]:
    packs = best_fit_decreasing([len(piece) for piece in chosen.pieces], sequence_length)
    return [
        read_pack(Pack(0, 1, tuple(Slice(i, 0, len(chosen.pieces[i])) for i in members)), chosen.pieces, [chosen.corpus], vocab_size)
        for members in packs
    ]
