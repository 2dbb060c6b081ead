"""A YAML file and dotted overrides as plain values that remember where each of them came from."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.errors import ConfigError

KeyPath = tuple[str | int, ...]

_INTEGER = re.compile(r"[-+]?[0-9](_?[0-9]){0,39}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITY = float("inf")
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False, ".inf": _INFINITY, "-.inf": -_INFINITY, ".nan": float("nan")}


def plain_value(text: str) -> Any:
    """The value of an unquoted YAML 1.2 scalar: ``3e-4`` is a number, ``no`` and ``2024-01-01`` are text, ``1e9`` is an integer."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        number = float(text)
        counts = "." not in text and number.is_integer() and abs(number) <= 2**53
        return int(number) if counts else number
    return text


@dataclass
class ConfigTree:
    """Nested plain values and the place that each came from."""

    values: dict[str, Any]
    origins: dict[KeyPath, str] = field(default_factory=dict)
    """Key path -> ``FILE line N`` or ``command line``; a path that is not here has the origin of its parent."""

    @classmethod
    def read(cls, path: str | Path) -> "ConfigTree":
        """Read one YAML file.

        Raises:
            ConfigError: the file cannot be read, is not YAML, repeats a key, or does not hold a mapping.
        """
        try:
            text = Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); accepted: a YAML file in UTF-8") from error
        origins: dict[KeyPath, str] = {}
        values = _parse(text, str(path), origins)
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: holds {_brief(values)}; accepted: a mapping of keys to values")
        return cls(values, origins)

    def override(self, assignment: str) -> None:
        """Apply ``dotted.path=YAML value``; a list item is named by its index.

        Raises:
            ConfigError: not an assignment, the value is not YAML, or the path leads through something that has no keys.
        """
        dotted, equals, text = assignment.partition("=")
        names = dotted.strip().split(".")
        if not equals or not all(names):
            raise ConfigError(f"command line: {assignment!r}; accepted: dotted.path=value")
        origins: dict[KeyPath, str] = {}
        value = _parse(text, f"command line: {dotted}", origins)
        path: KeyPath = ()
        node: Any = self.values
        for position, name in enumerate(names):
            key = _key_of(node, name, path)
            path = (*path, key)
            if position == len(names) - 1:
                node[key] = value
            elif isinstance(node, dict) and node.get(key) is None:
                node[key] = {}
            node = node[key]
        self.origins = {old: origin for old, origin in self.origins.items() if old[: len(path)] != path}
        self.origins[path] = "command line"

    def origin(self, path: KeyPath) -> str:
        """Where the value at ``path``, or the nearest section around it, came from; empty if it is a default."""
        return next((self.origins[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.origins), "")


def _key_of(node: Any, name: str, path: KeyPath) -> str | int:
    dotted = ".".join(map(str, path))
    if isinstance(node, dict):
        return name
    if not isinstance(node, list):
        raise ConfigError(f"command line: {dotted}.{name}: {dotted} is {_brief(node)}; accepted: {dotted}=value, it has no keys below it")
    if not re.fullmatch(r"[0-9]{1,9}", name) or int(name) >= len(node):
        raise ConfigError(f"command line: {dotted}.{name}: {dotted} has {len(node)} items; accepted: an index from 0 to {len(node) - 1}")
    return int(name)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _parse(text: str, origin: str, origins: dict[KeyPath, str]) -> Any:
    """Parse YAML ``text`` to plain values and note the line of every key in ``origins``."""
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
        return None if root is None else _convert(root, (), origin, origins, ())
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: {error}; accepted: YAML") from error
    except RecursionError as error:
        raise ConfigError(f"{origin}: nested too deeply; accepted: the sections of the configuration") from error


def _convert(node: yaml.Node, path: KeyPath, origin: str, origins: dict[KeyPath, str], parents: tuple[yaml.Node, ...]) -> Any:
    where = f"{origin} line {node.start_mark.line + 1}"
    if node in parents:
        raise ConfigError(f"{where}: an alias that contains itself; accepted: plain values")
    if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:str"):
        raise ConfigError(f"{where}: tag {node.tag!r}; accepted: values without a tag")
    origins[path] = where
    parents = (*parents, node)
    if isinstance(node, yaml.ScalarNode):
        return plain_value(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_convert(item, (*path, index), origin, origins, parents) for index, item in enumerate(node.value)]
    values: dict[str, Any] = {}
    for key, item in node.value:
        line = f"{origin} line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{line}: a key that is a list or a mapping; accepted: a word")
        if key.value in values:
            first = origins[*path, key.value]
            raise ConfigError(f"{line}: {'.'.join(map(str, (*path, key.value)))} stands here and in {first}; accepted: one of them")
        values[key.value] = _convert(item, (*path, key.value), origin, origins, parents)
        origins[*path, key.value] = line
    return values
