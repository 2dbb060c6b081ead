"""Where a text can be cut so that a tokenizer makes the same tokens of the parts as of the whole.

This is known for two kinds of tokenizers: those that ``tokenizer_training`` makes, and byte-level ones that cut a text by the pattern of
Llama 3, Qwen 2 and their descendants.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

_SPACE = " \u2581"
_ASCII_NEXT = r"(?![^\x00-\x7F])"
WORD_PATTERN = rf"\n+|[{_SPACE}]*(?:[A-Za-z]++{_ASCII_NEXT}|[\x00-\x09\x0B-\x1F!-@\[-`{{-\x7F]++{_ASCII_NEXT}|[^{_SPACE}\n]+)|[{_SPACE}]+"
"""Cuts a text before spaces, around newlines, and between ASCII letters and other ASCII characters.

No token of a tokenizer that ``tokenizer_training`` makes reaches over such a cut: sentencepiece has spaces only at the beginning of a token
and never mixes scripts in one, and sees no newline in training.
"""

BYTE_LEVEL_PATTERN = re.compile(
    r"\(\?i:'s\|'t\|'re\|'ve\|'m\|'ll\|'d\)\|\[\^\\r\\n\\p\{L\}\\p\{N\}\]\?\\p\{L\}\+\|\\p\{N\}(?P<digits>|\{1,3\})"
    r"\| \?\[\^\\s\\p\{L\}\\p\{N\}\]\+\[\\r\\n\]\*\|\\s\*\[\\r\\n\]\+\|\\s\+\(\?!\\S\)\|\\s\+"
)
"""Matches the pattern of Llama 3 (three digits a token) and that of Qwen 2 (one digit a token)."""

Definition = dict[str, Any]
FindWords = Callable[[str], list[str]]


def word_finder(definition: Definition, splits_special_tokens: bool) -> FindWords | None:
    """The function that cuts a text for a tokenizer, or None if none is known to be right.

    Args:
        definition: contents of its ``tokenizer.json``.
        splits_special_tokens: whether it takes the names of special tokens in a text for ordinary text.
    """
    if definition["pre_tokenizer"] == word_splitter() and definition["normalizer"] == space_marker() and splits_special_tokens:
        return re.compile(WORD_PATTERN).findall
    pattern = _byte_level_pattern(definition["pre_tokenizer"] or {})
    names = [token["content"] for token in definition["added_tokens"]]
    strips = any(token["lstrip"] or token["rstrip"] for token in definition["added_tokens"])
    plain_names = all(name.isascii() and not re.search(r"\s", name) for name in names) and not strips
    if pattern is None or definition["normalizer"] not in (None, {"type": "NFC"}) or not plain_names:
        return None
    return _ByteLevelWords(pattern["digits"], names)


def word_splitter() -> Definition:
    """The pre-tokenizer of a ``tokenizer.json`` that cuts by ``WORD_PATTERN``."""
    return {"type": "Split", "pattern": {"Regex": WORD_PATTERN}, "behavior": "Isolated", "invert": False}


def space_marker() -> Definition:
    """The normalizer of a ``tokenizer.json`` that writes a space as sentencepiece does."""
    return {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}


def _byte_level_pattern(pre_tokenizer: Definition) -> re.Match[str] | None:
    steps = pre_tokenizer.get("pretokenizers", [])
    if [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        return None
    split, byte_level = steps
    cuts = split["behavior"] == "Isolated" and not split["invert"]
    encodes = not byte_level["add_prefix_space"] and not byte_level["use_regex"]
    return BYTE_LEVEL_PATTERN.fullmatch(split["pattern"].get("Regex", "")) if cuts and encodes else None


class _ByteLevelWords:
    """Cuts ASCII text by the tokenizer's own pattern, and other text into lines.

    Python's ``re`` has no Unicode classes, but those of the pattern are simple in ASCII. A line ends after the last newline of a run of
    white space: there the pattern always cuts, and it never looks over it. A line in which the tokenizer might find the name of an added
    token is left whole.

    Args:
        digits: quantifier of digits in the pattern.
        names: of the added tokens.
    """

    def __init__(self, digits: str, names: list[str]) -> None:
        self._find_words = re.compile(
            rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{digits}| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            re.ASCII,
        ).findall
        self._find_name = re.compile("|".join(map(re.escape, names)) or "(?!)").search

    def __call__(self, text: str) -> list[str]:
        if self._is_plain(text):
            return self._find_words(text)
        return [word for line in _lines(text) for word in (self._find_words(line) if self._is_plain(line) else [line])]

    def _is_plain(self, text: str) -> bool:
        return text.isascii() and not self._find_name(text)


def _lines(text: str) -> Iterator[str]:
    begin = 0
    for space in re.finditer(r"\n\s*", text):
        end = space.start() + max(space[0].rfind("\n"), space[0].rfind("\r")) + 1
        yield text[begin:end]
        begin = end
    if begin < len(text):
        yield text[begin:]
