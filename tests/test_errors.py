import pytest

from megatron_ext.errors import LONGEST_LINE, ConfigError, DataError


@pytest.mark.parametrize(
    ("said", "printed"),
    [
        ("a.yaml: no such key\n  accepted: größe", "a.yaml: no such key\n  accepted: größe"),
        ("a\x1b[2Jb\r\x00", "a\\x1b[2Jb\\r\\x00"),  # steers no terminal
        ("\udcff", "\\udcff"),  # could not be encoded
    ],
)
def test_messages_can_be_printed_and_lines_are_kept(said: str, printed: str) -> None:
    assert str(ConfigError(said)) == printed


def test_a_line_that_quotes_at_length_keeps_its_beginning_and_its_end() -> None:
    quoted = "x" * 100_000
    first, second = str(DataError(f"a.yaml: config is {quoted!r}; accepted: a path\nin b.yaml")).split("\n")
    assert first.startswith("a.yaml: config is 'xxx") and first.endswith("xxx'; accepted: a path") and second == "in b.yaml"
    assert " characters left out] " in first
    assert len(first) < LONGEST_LINE + 50


def test_a_line_of_the_longest_length_is_whole() -> None:
    line = "".join(chr(ord("a") + place % 26) for place in range(LONGEST_LINE))
    assert str(DataError(line)) == line
