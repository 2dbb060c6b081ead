"""A configuration file with dotted overrides applied, as plain values that remember where each of them came from."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.config.yaml_text import KeyPath, parse
from megatron_ext.errors import ConfigError
from megatron_ext.option_rules import shown


@dataclass
class ConfigTree:
    """Nested dictionaries, lists and plain values, not yet checked against the schema."""

    values: dict[str, Any]
    places: dict[KeyPath, str]
    """Key path -> ``FILE line N`` or ``command line``."""

    @classmethod
    def read(cls, path: str | Path) -> "ConfigTree":
        """Read one YAML file.

        Raises:
            ConfigError: the file cannot be read, is not YAML, repeats a key, or does not hold a mapping.
        """
        try:
            text = Path(path).read_text("utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); accepted: a YAML file in UTF-8") from error
        values, places = parse(text, str(path))
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {shown(values)}; accepted: a mapping of keys to values")
        return cls(values, places)

    def override(self, assignment: str) -> None:
        """Apply ``dotted.path=value``: the value is YAML, a list item is named by its index, missing sections are made.

        Raises:
            ConfigError: not an assignment, not YAML, an index outside the list, or a path through something that has no keys.
        """
        dotted, equals, text = assignment.partition("=")
        path = tuple(dotted.strip().split("."))
        if not equals or not all(path):
            raise ConfigError(f"command line: {shown(assignment)}; accepted: dotted.path=value")
        value, _ = parse(text, f"command line: {dotted.strip()}")
        section = self._section(path[:-1])
        section[_key(section, path)] = value
        self.places = {old: place for old, place in self.places.items() if old[: len(path)] != path}
        self.places[path] = "command line"

    def place(self, dotted: str) -> str:
        """Where the value at ``dotted``, or else the nearest section around it, was written."""
        path = tuple(dotted.split("."))
        return next(self.places[path[:size]] for size in range(len(path), -1, -1) if path[:size] in self.places)

    def _section(self, path: KeyPath) -> Any:
        """The dictionary or list at ``path``; where there is nothing yet, an empty dictionary is put there."""
        section: Any = self.values
        for depth in range(1, len(path) + 1):
            key = _key(section, path[:depth])
            if isinstance(section, dict) and section.get(key) is None:
                section[key] = {}
                self.places[path[:depth]] = "command line"
            section = section[key]
        return section


def _key(section: Any, path: KeyPath) -> Any:
    """The key or index that the last name of ``path`` means in ``section``."""
    name, dotted = path[-1], ".".join(path)
    if isinstance(section, dict):
        return name
    owner = ".".join(path[:-1])
    if not isinstance(section, list):
        raise ConfigError(f"command line: {dotted}: {owner} is {shown(section)}; accepted: {owner}=value, it has no keys below it")
    if not re.fullmatch(r"[0-9]{1,9}", name) or int(name) >= len(section):
        indices = f"an index below {len(section)}, or {owner}=[...] for the whole list"
        raise ConfigError(f"command line: {dotted}: {owner} has {len(section)} items; accepted: {indices}")
    return int(name)
