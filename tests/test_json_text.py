import json
import sys

import pytest

from megatron_ext.json_text import parse_json


@pytest.mark.parametrize("text", ['{"a": [1, 2.5, null, "\\u00e9"]}', "3", "[]"])
def test_reads_what_the_standard_library_reads_as_text_and_as_bytes(text: str) -> None:
    assert parse_json(text) == parse_json(text.encode("utf-8")) == json.loads(text)


@pytest.mark.parametrize("text", [b"", b"{", b"[1,]", b'"\xff"', b"\xef\xbb\xbf{}"])
def test_what_is_not_json_or_not_utf8_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_text_nested_too_deeply_is_a_value_error_that_says_so() -> None:
    depth = 100 * sys.getrecursionlimit()
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * depth + "]" * depth)
