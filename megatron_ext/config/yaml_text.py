"""YAML as this package reads and writes it: YAML 1.2 scalars, no tags, no repeated keys, and a line number for every key."""

import math
import re
from typing import Any

import yaml

from megatron_ext.errors import ConfigError

KeyPath = tuple[str, ...]
"""Keys from the root; the index of a list item is its decimal text."""

_DEEPEST = 32
_INTEGER = re.compile(r"[-+]?[0-9](_?[0-9]){0,39}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:str")


def plain_value(text: str) -> bool | int | float | str | None:
    """The value of an unquoted scalar.

    As in YAML 1.2 ``3e-4`` is a number while ``no`` and ``2024-01-01`` are text. Beyond it, ``1e9`` is an integer, because token counts
    are written so, and ``1_000`` may be grouped.
    """
    match text.lower():
        case "" | "~" | "null":
            return None
        case "true":
            return True
        case "false":
            return False
    if _INTEGER.fullmatch(text):
        return int(text)
    if not _FLOAT.fullmatch(text) or math.isinf(float(text)):
        return text
    number = float(text)
    is_count = "." not in text and number.is_integer() and abs(number) <= 2**53
    return int(number) if is_count else number


def parse(text: str, source: str) -> tuple[Any, dict[KeyPath, str]]:
    """Parse one YAML document to dictionaries, lists and plain values, and say where every one of them stands.

    Args:
        text: the document.
        source: what the document is called in messages.

    Returns:
        The value, and the place of every key path in it: ``SOURCE line N``; of the root, ``SOURCE``.

    Raises:
        ConfigError: not YAML, a repeated key, a key that is not a word, a tag, an alias inside itself, or nested too deeply.
    """
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: {error}; accepted: YAML") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply; accepted: at most {_DEEPEST} levels") from error
    if root is None:
        return None, {(): source}
    reader = _Reader(source)
    return reader.value(root, (), source), reader.places


def render(values: dict[str, Any]) -> str:
    """``values`` as YAML that ``parse`` reads back equal, keys in the order given."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140)


class _Reader:
    """Turns YAML nodes into values and notes their places."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.places: dict[KeyPath, str] = {}

    def value(self, node: yaml.Node, path: KeyPath, place: str, parents: tuple[yaml.Node, ...] = ()) -> Any:
        self.places[path] = place
        if node in parents:
            raise ConfigError(f"{place}: an alias of something around it; accepted: values that end")
        if node.tag not in _PLAIN_TAGS:
            raise ConfigError(f"{place}: tag {node.tag}; accepted: values without a tag")
        if len(parents) == _DEEPEST:
            raise ConfigError(f"{place}: nested too deeply; accepted: at most {_DEEPEST} levels")
        parents = (*parents, node)
        if isinstance(node, yaml.ScalarNode):
            return plain_value(node.value) if node.style is None else node.value
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, str(index)), self.line(item), parents) for index, item in enumerate(node.value)]
        lines = self.key_lines(node, path)
        return {key.value: self.value(item, (*path, key.value), lines[key.value], parents) for key, item in node.value}

    def key_lines(self, mapping: yaml.MappingNode, path: KeyPath) -> dict[str, str]:
        """Where each key of ``mapping`` stands; raises ConfigError for a repeated key and for one that is not a word."""
        lines: dict[str, str] = {}
        for key, _ in mapping.value:
            line = self.line(key)
            if not isinstance(key, yaml.ScalarNode) or key.tag not in _PLAIN_TAGS:
                raise ConfigError(f"{line}: a key that is a list, a mapping or has a tag; accepted: a word")
            if key.value in lines:
                raise ConfigError(f"{line}: {'.'.join((*path, key.value))} stands also at {lines[key.value]}; accepted: each key once")
            lines[key.value] = line
        return lines

    def line(self, node: yaml.Node) -> str:
        return f"{self.source} line {node.start_mark.line + 1}"


class _Dumper(yaml.SafeDumper):
    """Quotes what either this package or a YAML 1.1 reader would not take for text, and repeats values instead of aliasing them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # Only double quotes keep line breaks of every kind as they are.
        style = '"' if not text.isprintable() else None if plain_value(text) is text else "'"
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)
