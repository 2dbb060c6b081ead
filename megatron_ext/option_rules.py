"""How a room states what its options accept. One rule is one line; all broken rules are reported together."""

import difflib
from collections.abc import Iterable
from typing import NamedTuple

from megatron_ext.errors import ConfigError


class Problem(NamedTuple):
    """A key that cannot be used as it is."""

    key: str
    """Name of the field, or a dotted path below the object that raises."""
    seen: object
    """The value it has."""
    accepted: str
    """What it may be, in words."""

    def __str__(self) -> str:
        return f"{self.key}: {self.seen!r}; accepted: {self.accepted}"


class OptionError(ConfigError):
    """Options that break the rules of their room."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(map(str, self.problems)))


def require(*rules: tuple[bool, str, object, str]) -> None:
    """Raise OptionError with every rule that does not hold; a rule is (holds, key, value seen, what is accepted)."""
    problems = [Problem(key, seen, accepted) for holds, key, seen, accepted in rules if not holds]
    if problems:
        raise OptionError(problems)


def one_of(names: Iterable[str], seen: str) -> str:
    """``names`` in words, with the one nearest to ``seen``."""
    names = list(names)
    nearest = difflib.get_close_matches(seen, names, n=1)
    return ", ".join(names) + (f"; nearest: {nearest[0]}" if nearest else "")
