"""A text may be cut where it is cut: the tokens of the parts are the tokens of the whole."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from megatron_ext.data.tokenizer import Tokenizer as OurTokenizer
from megatron_ext.data.words import word_finder
from tests.data.byte_level import LLAMA_3, QWEN_2, byte_level_backend, split_then_bytes


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [path.read_text("utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py"))]


@pytest.fixture(scope="module")
def llama_3(texts: list[str]) -> Tokenizer:
    return byte_level_backend(split_then_bytes(LLAMA_3), texts)


@pytest.fixture(scope="module")
def qwen_2(texts: list[str]) -> Tokenizer:
    backend = byte_level_backend(split_then_bytes(QWEN_2), texts)
    backend.normalizer = normalizers.NFC()
    return backend


def find(backend: Tokenizer, splits_special_tokens: bool = False) -> Callable[[str], list[str]] | None:
    return word_finder(json.loads(backend.to_str()), splits_special_tokens)


def difficult_texts() -> st.SearchStrategy[str]:
    """Any text, and text of what the patterns tell apart."""
    letters = st.sampled_from([*"saTé漢\u017f\u212a\u0301", "self", "<|end|>", "<|end"])
    others = st.sampled_from([*" \n\t\r\x00\x0b\x1c\x85\u2028\u00a0_=.#<'\"019”", "'s", "'LL", "\n\n", "    ", "\r\n", " \n"])
    pieces = st.tuples(letters | others, st.integers(1, 5)).map(lambda run: run[0] * run[1])
    return st.lists(pieces, max_size=20).map("".join) | st.text(st.characters(exclude_categories=["Cs"]))


@pytest.mark.parametrize("name", ["llama_3", "qwen_2"])
def test_parts_have_the_tokens_of_the_whole(name: str, texts: list[str], request: pytest.FixtureRequest) -> None:
    backend = request.getfixturevalue(name)
    ours = OurTokenizer(backend.to_str(), 0, name)
    assert ours._words is not None

    def check(text: str) -> None:
        words = ours._words._find_words(text)
        assert "".join(words) == text
        whole = backend.encode(text, add_special_tokens=False).ids
        assert [token for word in words for token in backend.encode(word, add_special_tokens=False).ids] == whole
        assert ours.encode(text).tolist() == whole

    for text in texts:
        check(text)
    settings(max_examples=500, deadline=None)(given(text=difficult_texts())(check))()


def test_words_are_words(llama_3: Tokenizer) -> None:
    words = find(llama_3)
    assert words("if x1234 == 'a':\n\n    return\n") == [
        *("if", " x", "123", "4", " ==", " '", "a", "':\n\n", "   ", " return", "\n"),
    ]
    assert words("a b\n\n  é c\nd e\n") == ["a", " b", "\n\n", "  é c\n", "d", " e", "\n"]
    assert words("a b\nc <|end|> d\n") == ["a", " b", "\n", "c <|end|> d\n"]


def test_newlines_are_cut_in_linear_time(llama_3: Tokenizer) -> None:
    assert find(llama_3)("\n" * 300_000 + "é") == ["\n" * 300_000, "é"]


def with_token(backend: Tokenizer, token: AddedToken) -> Tokenizer:
    copy = Tokenizer.from_str(backend.to_str())
    copy.add_tokens([token])
    return copy


def test_where_cuts_are_not_known_to_be_right_there_are_none(llama_3: Tokenizer, texts: list[str]) -> None:
    assert find(llama_3) is not None and find(with_token(llama_3, AddedToken("<|x|>"))) is not None
    for token in (AddedToken("two words"), AddedToken("<|é|>"), AddedToken("<|x|>", lstrip=True), AddedToken("<|x|>", rstrip=True)):
        assert find(with_token(llama_3, token)) is None
    others = [
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        split_then_bytes(LLAMA_3.replace(r"|\s*[\r\n]+", "")),
        split_then_bytes(LLAMA_3, "removed"),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        pre_tokenizers.Metaspace(),
    ]
    for pre_tokenizer in others:
        backend = Tokenizer.from_str(llama_3.to_str())
        backend.pre_tokenizer = pre_tokenizer
        assert find(backend) is None
    backend = Tokenizer.from_str(llama_3.to_str())
    backend.normalizer = normalizers.Lowercase()
    assert find(backend) is None
