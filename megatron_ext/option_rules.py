"""How a room states what its options accept: one line a rule, and all broken rules are reported together."""

import difflib
from collections.abc import Iterable
from typing import NamedTuple

from megatron_ext.errors import ConfigError


class Problem(NamedTuple):
    """A key that cannot be used as it is."""

    key: str
    """Name of the field, or a dotted path below the object whose rule is broken."""
    found: str
    """The value seen, as the user would recognise it."""
    accepted: str
    """What it may be, in words."""

    def __str__(self) -> str:
        return f"{self.key}: {self.found}; accepted: {self.accepted}"


class OptionError(ConfigError):
    """Options that break rules of their owner."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


def require(*rules: tuple[bool, str, object, str]) -> None:
    """Check rules of the form (holds, key, value seen, what is accepted).

    Raises:
        OptionError: naming every rule that does not hold.
    """
    problems = [Problem(key, shown(seen), accepted) for holds, key, seen, accepted in rules if not holds]
    if problems:
        raise OptionError(problems)


def shown(value: object) -> str:
    """``value`` as it stands in a message: short, and with the words that YAML has for null and truth."""
    yaml_words = {"None": "null", "True": "true", "False": "false"}
    text = repr(value)
    return yaml_words.get(text, text if len(text) <= 80 else text[:77] + "...")


def one_of(names: Iterable[str], seen: str) -> str:
    """``names`` in words, with the one nearest to ``seen`` where there is one."""
    names = list(names)
    nearest = difflib.get_close_matches(seen, names, n=1)
    return ", ".join(names) + (f"; nearest: {nearest[0]}" if nearest else "")
