"""Files and overrides before the schema sees them."""

from pathlib import Path

import pytest

from megatron_ext.config.tree import ConfigTree
from megatron_ext.errors import ConfigError


@pytest.fixture
def tree(tmp_path: Path) -> ConfigTree:
    path = tmp_path / "run.yaml"
    path.write_text("a: {b: 1, c: 2}\nlist:\n  - {w: 1}\n  - {w: 2}\nempty:\nword: text\n", "utf-8")
    return ConfigTree.read(path)


@pytest.mark.parametrize(
    ("assignment", "key", "value"),
    [
        ("a.b=3e-4", "a", {"b": 3e-4, "c": 2}),
        ("a.new.deep=x=y", "a", {"b": 1, "c": 2, "new": {"deep": "x=y"}}),
        ("list.1.w=7", "list", [{"w": 1}, {"w": 7}]),
        ("list=[{w: 3}, 4]", "list", [{"w": 3}, 4]),
        ("a={d: [1, two]}", "a", {"d": [1, "two"]}),
        ("empty.x=true", "empty", {"x": True}),
        ("word=", "word", None),
        ("word='1'", "word", "1"),
    ],
)
def test_override(tree: ConfigTree, assignment: str, key: str, value: object) -> None:
    tree.override(assignment)
    assert tree.values[key] == value


def test_the_last_override_wins(tree: ConfigTree) -> None:
    tree.override("a.b=5")
    tree.override("a.b=6")
    assert tree.values["a"]["b"] == 6


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("a.b", "command line: 'a.b'; accepted: dotted.path=value"),
        ("=3", "command line: '=3'; accepted: dotted.path=value"),
        ("a..b=3", "command line: 'a..b=3'; accepted: dotted.path=value"),
        ("word.x=3", "command line: word.x: word is 'text'; accepted: word=value, it has no keys below it"),
        ("list.2.w=3", "command line: list.2: list has 2 items; accepted: an index below 2, or list=[...] for the whole list"),
        ("list.-1.w=3", "command line: list.-1: list has 2 items; accepted: an index below 2, or list=[...] for the whole list"),
        ("list.w=3", "command line: list.w: list has 2 items; accepted: an index below 2, or list=[...] for the whole list"),
        ("a.b={x: 1, x: 2}", "command line: a.b line 1: x stands also at command line: a.b line 1; accepted: each key once"),
    ],
)
def test_override_that_leads_nowhere(tree: ConfigTree, assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        tree.override(assignment)
    assert str(error.value) == message


def test_override_that_is_not_yaml(tree: ConfigTree) -> None:
    with pytest.raises(ConfigError, match=r"^command line: a\.b: while parsing a flow sequence"):
        tree.override("a.b=[1")


def test_place_is_the_line_or_the_command_line(tree: ConfigTree, tmp_path: Path) -> None:
    tree.override("list.1={w: 3}")
    file = tmp_path / "run.yaml"
    assert tree.place("list.0.w") == f"{file} line 3"
    assert tree.place("list.1.w") == "command line"
    assert tree.place("a.unknown") == f"{file} line 1"
    assert tree.place("not.there") == str(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "null; accepted: a mapping"),
        (b"- 1", "[1]; accepted: a mapping"),
        (b"a: \xff", "cannot be read"),
        (b"3", "3; accepted: a mapping"),
    ],
)
def test_file_that_holds_no_mapping(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        ConfigTree.read(path)
    assert str(error.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize("name", ["absent.yaml", ".", "nul\0.yaml"])
def test_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        ConfigTree.read(f"{tmp_path}/{name}")
