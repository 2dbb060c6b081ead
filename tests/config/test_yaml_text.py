"""YAML in, YAML out."""

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config.yaml_text import parse, plain_value, render
from megatron_ext.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("3E-4", 3e-4),
        (".5", 0.5),
        ("5.", 5.0),
        ("-1.5e3", -1500.0),
        ("1e9", 10**9),
        ("15e-1", 1.5),
        ("1_000_000", 10**6),
        ("-7", -7),
        ("010", 10),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
    ],
)
def test_plain_scalars_have_a_type(text: str, value: object) -> None:
    seen = plain_value(text)
    assert seen == value
    assert type(seen) is type(value)


@pytest.mark.parametrize("text", ["no", "on", "2024-01-01", "12:30:45", "1e999", ".nan", "e5", "1_", "0x10", "a b", "."])
def test_everything_else_is_text(text: str) -> None:
    assert plain_value(text) is text


def test_quoted_scalars_are_text() -> None:
    value, _ = parse("a: '3'\nb: \"true\"\nc: |\n  4\n", "f")
    assert value == {"a": "3", "b": "true", "c": "4\n"}


def test_agrees_with_pyyaml_where_yaml_versions_agree() -> None:
    text = "a: 1\nb: [1.5, x, {c: null, d: true}]\ne:\n  - f: 'g'\n  - h\n&i j: &k {l: 2}\nm: *k\n"
    assert parse(text, "f")[0] == yaml.safe_load(text)


def test_every_key_has_the_line_that_it_stands_in() -> None:
    _, places = parse("a: 1\nb:\n  c:\n    - 2\n    -\n      d: 3\n", "f.yaml")
    assert places == {
        (): "f.yaml",
        ("a",): "f.yaml line 1",
        ("b",): "f.yaml line 2",
        ("b", "c"): "f.yaml line 3",
        ("b", "c", "0"): "f.yaml line 4",
        ("b", "c", "1"): "f.yaml line 6",
        ("b", "c", "1", "d"): "f.yaml line 6",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:\n  b: 1\n  c: 2\n  b: 3", "f line 4: a.b stands also at f line 2; accepted: each key once"),
        ("? [1]\n: 2", "f line 1: a key that is a list, a mapping or has a tag; accepted: a word"),
        ("!!int 3: 2", "f line 1: a key that is a list, a mapping or has a tag; accepted: a word"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]", "f line 2: tag tag:yaml.org,2002:python/object/apply:os.system; accepted"),
        ("a: &x [*x]", "f line 1: an alias of something around it; accepted: values that end"),
        ("[" * 40 + "]" * 40, "f line 1: nested too deeply; accepted: at most 32 levels"),
        ("[" * 1_000, "f: nested too deeply; accepted: at most 32 levels"),
        ("a: [1", "f: while parsing a flow sequence"),
        ("a: 1\n---\nb: 2", "f: expected a single document"),
        ("a: *nowhere", "f: found undefined alias"),
        ("a: \x07", "f: unacceptable character"),
    ],
)
def test_refuses_with_the_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(text, "f")
    assert str(error.value).startswith(message)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=12,
)
"""Anything that a configuration can hold."""


def _typed(value: Any) -> Any:
    """``value`` with the type of every scalar in it, because 1 == 1.0 == True."""
    if isinstance(value, dict):
        return {key: _typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_typed(item) for item in value]
    return type(value), value


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=8), PLAIN, max_size=4))
def test_what_is_rendered_is_read_back_equal(values: dict[str, Any]) -> None:
    assert _typed(parse(render(values), "f")[0]) == _typed(values)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.text(max_size=8), st.sampled_from(["no", "1e9", "3e-4", "010", "2024-01-01", "12:30", "null", "x", "", "0o7", "="]))
)
def test_text_stays_text_for_other_yaml_readers(values: dict[str, str]) -> None:
    assert yaml.safe_load(render(values)) == values
