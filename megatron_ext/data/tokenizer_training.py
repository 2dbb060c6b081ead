"""Train a byte-pair tokenizer with sentencepiece, and save it so that ``transformers`` loads the same one.

Byte-pair encoding of text: Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", algorithm 1.
"""

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_ext.atomic_io import atomic_open, write_json
from megatron_ext.data.words import space_marker, word_splitter
from megatron_ext.errors import DataError

SPECIAL_TOKENS = {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"}
"""Their ids are 0, 1, 2 and 3."""

LONGEST_SENTENCE = 4096  # characters; the trainer skips a sentence that is too long, so lines are cut here


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    folder: str | Path,
    *,
    character_coverage: float = 0.9995,
    max_lines: int = 5_000_000,
) -> None:
    """Train on ``texts`` and write tokenizer.model (sentencepiece), tokenizer.json and tokenizer_config.json (Hugging Face).

    Both give the same ids. Decoding the ids of a text gives the text back, whatever its spaces, control characters or alphabet: a character
    that is not in the vocabulary becomes its UTF-8 bytes. One exception is in the format: U+2581, with which sentencepiece writes a space,
    comes back as a space. The same texts and arguments give the same files.

    Args:
        texts: documents to learn from, read once.
        vocab_size: number of tokens, with 4 special ones and 256 bytes.
        folder: where to write; made if missing.
        character_coverage: share of the text's characters that get tokens of their own.
        max_lines: lines to learn from; of longer input a random sample is taken, the same one every time.

    Raises:
        DataError: ``vocab_size`` does not fit the texts.
        Exception: whatever ``texts`` raises.
    """
    model = io.BytesIO()
    failures: list[Exception] = []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts, failures),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            input_sentence_size=max_lines,
            max_sentence_length=4 * LONGEST_SENTENCE,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            **{f"{name}_id": number for number, name in enumerate(SPECIAL_TOKENS)},
            **{f"{name}_piece": piece for name, piece in SPECIAL_TOKENS.items()},
            minloglevel=2,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        raise DataError(f"sentencepiece cannot learn {vocab_size} tokens from these texts: {error}") from error
    _save(model.getvalue(), Path(folder))


def _sentences(texts: Iterable[str], failures: list[Exception]) -> Iterator[str]:
    """Lines without their ends, so that no token but the byte itself contains a newline.

    What ``texts`` raises is also put into ``failures``: sentencepiece turns every exception into a RuntimeError of its own.
    """
    try:
        for text in texts:
            for line in text.split("\n"):
                for start in range(0, len(line), LONGEST_SENTENCE):
                    yield line[start : start + LONGEST_SENTENCE]
    except Exception as error:
        failures.append(error)
        raise


def _save(model: bytes, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_open(folder / "tokenizer.model", "wb") as file:
        file.write(model)
    definition = _hugging_face_definition(sentencepiece.SentencePieceProcessor(model_proto=model))
    with atomic_open(folder / "tokenizer.json") as file:
        json.dump(definition, file, ensure_ascii=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": piece for name, piece in SPECIAL_TOKENS.items()},
        "split_special_tokens": True,  # as in sentencepiece, "</s>" in a document is four characters and not the end of it
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 30,
    }
    write_json(folder / "tokenizer_config.json", config)


def _hugging_face_definition(processor: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """The ``tokenizer.json`` of a sentencepiece model."""
    pieces = [processor.id_to_piece(number) for number in range(processor.get_piece_size())]
    special = [
        {"id": pieces.index(piece), "content": piece, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for piece in SPECIAL_TOKENS.values()
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": space_marker(),
        "pre_tokenizer": word_splitter(),
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": SPECIAL_TOKENS["unk"],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: number for number, piece in enumerate(pieces)},
            "merges": _merges(processor, pieces),
        },
    }


def _merges(processor: sentencepiece.SentencePieceProcessor, pieces: list[str]) -> list[list[str]]:
    """Pairs of tokens that become one token, first to last.

    sentencepiece stores only the tokens: any two that make a third may be joined, and the third's score says when.
    """
    ordinary = {
        piece: processor.get_score(number)
        for number, piece in enumerate(pieces)
        if not (processor.is_byte(number) or processor.is_control(number) or processor.is_unknown(number))
    }
    merges = []
    for piece in sorted(ordinary, key=lambda piece: -ordinary[piece]):
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        joinable = [pair for pair in pairs if pair[0] in ordinary and pair[1] in ordinary]
        merges += [list(pair) for pair in sorted(joinable, key=lambda pair: (-ordinary[pair[0]], -ordinary[pair[1]]))]
    return merges
