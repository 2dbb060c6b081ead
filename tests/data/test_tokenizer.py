"""Tokenizers: the same ids from sentencepiece, transformers and our faster way, for any text."""

import json
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, MistralConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

import megatron_ext.data.tokenizer as tokenizer_module
from megatron_ext.data.tokenizer import Tokenizer, WordCache, copy_tokenizer_files, load_tokenizer, token_dtype
from megatron_ext.data.tokenizer_training import train_tokenizer
from megatron_ext.data.words import WORD_PATTERN
from megatron_ext.errors import DataError
from tests.data.byte_level import byte_level_backend

VOCAB_SIZE = 600
DIFFICULT = {
    "empty": "",
    "spaces": "  two   three    four ",
    "only spaces": " " * 37,
    "newlines": "a\n\nb\n\n\n   c\r\nd\n",
    "tabs": "\tx\t\ty \t z",
    "control characters": "a\x00b\x01\x1c\x1f\x7f\x85c",
    "unicode spaces": "a\u00a0b\u2003c\u2028d\u3000e\ufeffg",
    "accents": "é e\u0301 ﬁ ½ Å \u212b naïve café",
    "scripts": "漢字かな한글 العربية עברית हिन्दी ไทย Ελληνικά кириллица",
    "emoji": "🙂👩‍👩‍👧🇫🇷👍🏽",
    "letters beside others": "caf\u00e9(x)…“quoted”—dash1.5e-10_name",
    "special tokens as text": "a</s><s> <unk><pad> <0x0A> <0xFF>",
    "code": "def f(x: int) -> str:\n    if x == 10:\n\t\treturn f'{x!r:>{width}}'  # no\n",
    "ASCII joined with other characters": "cafés “so”, déjà” ”. x”,y é”a",
    "rare characters": "\U0010ffff\ue000\ufffd",
}


# Frequent enough that sentencepiece joins ASCII characters with others.
MIXED = "café déjà, “so”; “no”, cafés “yes”. " * 200


def training_texts() -> list[str]:
    return [*source_code(), *DIFFICULT.values(), MIXED]


def source_code() -> list[str]:
    folder = Path(json.__file__).parent
    return [path.read_text("utf-8") for path in sorted((*folder.glob("*.py"), Path(shutil.__file__)))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train_tokenizer(training_texts(), VOCAB_SIZE, folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def processor(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def hugging_face(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of the kind that GPT-2 has."""
    backend = byte_level_backend(pre_tokenizers.ByteLevel(add_prefix_space=False), source_code())
    folder = tmp_path_factory.mktemp("byte_level")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(folder)
    return folder


def assert_all_agree(
    text: str, trained: Tokenizer, processor: sentencepiece.SentencePieceProcessor, hugging_face: PreTrainedTokenizerFast
) -> None:
    ids = processor.encode(text)
    assert hugging_face(text, add_special_tokens=False)["input_ids"] == ids
    assert trained.encode(text).tolist() == ids
    assert trained.decode(ids) == hugging_face.decode(ids) == processor.decode(ids) == text


@pytest.mark.parametrize("name", DIFFICULT)
def test_same_ids_and_the_text_back(
    name: str, trained: Tokenizer, processor: sentencepiece.SentencePieceProcessor, hugging_face: PreTrainedTokenizerFast
) -> None:
    assert_all_agree(DIFFICULT[name], trained, processor, hugging_face)


def texts() -> st.SearchStrategy[str]:
    """Any text, and text of characters at which tokenizers cut, but for U+2581."""
    cuts = st.sampled_from([*" \n\t\r\x00\x0b\x1c\x85\u2028\u00a0éß漢🙂\u0301—”()_=.#<>'\"019aeinorstASELF", "self", "    ", "</s>", "▂"])
    anything = st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])
    return (
        st.text(anything)
        | st.lists(cuts).map("".join)
        | st.lists(st.tuples(cuts, st.integers(1, 20)).map(lambda run: run[0] * run[1])).map("".join)
    )


@settings(max_examples=400, deadline=None)
@given(text=texts())
def test_same_ids_for_any_text(
    text: str, trained: Tokenizer, processor: sentencepiece.SentencePieceProcessor, hugging_face: PreTrainedTokenizerFast
) -> None:
    assert_all_agree(text, trained, processor, hugging_face)


def test_same_ids_for_long_runs_of_one_character(trained: Tokenizer, processor: sentencepiece.SentencePieceProcessor) -> None:
    for character in " =-_#.a0\n\té":
        for count in range(1, 130):
            assert trained.encode(character * count).tolist() == processor.encode(character * count)


def test_the_one_character_that_does_not_come_back(trained: Tokenizer, processor: sentencepiece.SentencePieceProcessor) -> None:
    """sentencepiece writes a space as U+2581."""
    assert trained.encode("a\u2581b").tolist() == processor.encode("a\u2581b") == processor.encode("a b")


def test_text_is_cut_into_words_and_they_are_remembered(trained: Tokenizer) -> None:
    """Negative control: without the cache in use, the agreement above says nothing about it."""
    assert trained._words is not None
    trained.encode("remember_me now")
    assert {"remember", "_", "me", " now"} <= set(trained._words._ids)


def test_cache_is_bounded(folder: Path, trained: Tokenizer) -> None:
    words = WordCache(
        Backend.from_file(str(folder / "tokenizer.json")), trained.dtype, re.compile(WORD_PATTERN).findall, max_words=50, max_length=10
    )
    text = " ".join("x" * (number % 20) + "y" * (number // 20) for number in range(400))
    for part in (text, text[::-1], text):
        assert words.encode(part).tolist() == trained.encode(part).tolist()
        assert len(words._ids) <= 50
    words.encode("aa" + " " + "b" * 11)
    assert "aa" in words._ids and " " + "b" * 11 not in words._ids


def test_special_tokens(trained: Tokenizer, hugging_face: PreTrainedTokenizerFast) -> None:
    assert [hugging_face.unk_token_id, hugging_face.bos_token_id, hugging_face.eos_token_id, hugging_face.pad_token_id] == [0, 1, 2, 3]
    assert trained.eod_id == 2 and trained.vocab_size == len(hugging_face) == VOCAB_SIZE
    assert trained.decode([2]) == "" and trained.decode([2], skip_special_tokens=False) == "</s>"


def test_no_token_contains_a_newline_or_two_words(processor: sentencepiece.SentencePieceProcessor) -> None:
    pieces = [processor.id_to_piece(number) for number in range(4 + 256, VOCAB_SIZE)]
    assert not any("\n" in piece or "\u2581" in piece.lstrip("\u2581") for piece in pieces)
    assert "fé" in pieces and "”," in pieces, "the texts above do not try what they should"
    assert any(len(piece) > 3 for piece in pieces) and any(set(piece) == {"\u2581"} and len(piece) > 1 for piece in pieces)


def test_training_again_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(training_texts(), VOCAB_SIZE, tmp_path)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_sample_of_long_input_is_the_same_every_time(tmp_path: Path) -> None:
    for name, lines in (("a", 200), ("b", 200), ("c", 300)):
        train_tokenizer(source_code(), 400, tmp_path / name, max_lines=lines)
    first, same, other = ((tmp_path / name / "tokenizer.json").read_bytes() for name in "abc")
    assert first == same != other


def test_long_lines_are_learned_from(tmp_path: Path) -> None:
    """The trainer by itself skips a line of more than a few thousand bytes."""
    train_tokenizer(["wordone wordtwo " * 5000], 292, tmp_path)
    assert len(load_tokenizer(tmp_path).encode(" wordtwo")) == 1


def test_vocabulary_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot learn 5000 tokens from these texts: .*<= \d+"):
        train_tokenizer(["a few words"], 5000, tmp_path)
    with pytest.raises(DataError, match="cannot learn 100 tokens"):
        train_tokenizer(["a few words"], 100, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig, Qwen3Config, Qwen2Config])
def test_beside_the_config_of_a_model(config: type, folder: Path, trained: Tokenizer, tmp_path: Path) -> None:
    copy_tokenizer_files(folder, tmp_path)
    config(vocab_size=VOCAB_SIZE).save_pretrained(tmp_path)
    text = "".join(DIFFICULT.values())
    assert load_tokenizer(tmp_path).encode(text).tolist() == trained.encode(text).tolist()
    if config is not Qwen2Config:  # transformers always gives a qwen2 model the pre-tokenizer of Qwen2
        assert AutoTokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False)["input_ids"] == trained.encode(text).tolist()


def test_any_fast_tokenizer(byte_level: Path) -> None:
    ours, theirs = load_tokenizer(byte_level), AutoTokenizer.from_pretrained(byte_level)
    texts = [*DIFFICULT.values(), *source_code(), "a<|end|>b"]
    for ids, text in zip(ours.encode_batch(texts), texts, strict=True):
        assert ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"]
        assert ids.dtype == np.uint16
    assert ours.eod_id == theirs.eos_token_id and ours.vocab_size == len(theirs)
    assert ours.encode("a<|end|>b").tolist().count(ours.eod_id) == 1, "special tokens in a text are what the folder makes of them"


@pytest.mark.parametrize("which", ["folder", "byte_level"])
def test_tokenizer_can_be_sent_to_another_process(which: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(which))
    copy = pickle.loads(pickle.dumps(tokenizer))
    text = "".join(DIFFICULT.values())
    assert copy.encode(text).tolist() == tokenizer.encode(text).tolist()
    for name in ("eod_id", "vocab_size", "dtype", "name"):
        assert getattr(copy, name) == getattr(tokenizer, name)


def test_token_dtype_as_megatron_has_it() -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    for size in (300, 65499, 65500, 65536, 65537, 151936):
        assert token_dtype(size) == np.dtype(megatron.DType.optimal_dtype(size))


def broken_folders(folder: Path, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    yield tmp_path / "nowhere", "not a tokenizer folder"
    for name, damage, message in (
        ("no_eos", '{"tokenizer_class": "PreTrainedTokenizerFast"}', "no eos_token"),
        ("bad_config", '{"tokenizer_class": ', "cannot load"),
    ):
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "tokenizer_config.json").write_text(damage)
        yield tmp_path / name, message
    shutil.copytree(folder, tmp_path / "truncated")
    (tmp_path / "truncated" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:5000])
    yield tmp_path / "truncated", "cannot load"
    shutil.copytree(folder, tmp_path / "far_id")
    definition = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    definition["model"]["vocab"]["far"] = 2**32 - 1  # 16 GiB to write, were it accepted
    (tmp_path / "far_id" / "tokenizer.json").write_text(json.dumps(definition), "utf-8")
    yield tmp_path / "far_id", "the id of token 'far' is 4294967295; accepted: ids to 16777215"


def test_a_tokenizer_that_cannot_be_read_back_is_named(byte_level: Path, tmp_path: Path) -> None:
    """transformers replaces the token that two names share by its id; what is left is not what the merges need."""
    definition = json.loads((byte_level / "tokenizer.json").read_text("utf-8"))
    vocabulary = definition["model"]["vocab"]
    merged = ["".join(merge) for merge in definition["model"]["merges"][:40]]
    # Which of two names stays is decided by chance, anew in each process.
    vocabulary |= {f"other {name}": vocabulary[name] for name in merged}
    shutil.copytree(byte_level, tmp_path / "twice")
    (tmp_path / "twice" / "tokenizer.json").write_text(json.dumps(definition), "utf-8")
    with pytest.raises(DataError, match="twice: this tokenizer contradicts itself: .* out of vocabulary"):
        load_tokenizer(tmp_path / "twice")


def test_a_panic_of_the_backend_names_the_folder(byte_level: Path, tmp_path: Path) -> None:
    definition = json.loads((byte_level / "tokenizer.json").read_text("utf-8"))
    definition["model"]["continuing_subword_prefix"] = "longer than any token"
    shutil.copytree(byte_level, tmp_path / "prefixed")
    (tmp_path / "prefixed" / "tokenizer.json").write_text(json.dumps(definition), "utf-8")
    with pytest.raises(DataError, match="prefixed: transformers cannot load this tokenizer: range"):
        load_tokenizer(tmp_path / "prefixed")


def test_unusable_folders_are_named(folder: Path, tmp_path: Path) -> None:
    for path, message in broken_folders(folder, tmp_path):
        with pytest.raises(DataError, match=rf"{path.name}.*{message}"):
            load_tokenizer(path)


def test_copy_needs_tokenizer_files(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer files"):
        copy_tokenizer_files(tmp_path, tmp_path)
    (tmp_path / "copy").mkdir()
    copy_tokenizer_files(folder, tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == set(tokenizer_module.FILES) & {path.name for path in folder.iterdir()}
