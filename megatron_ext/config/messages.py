"""What pydantic found, in words: the path, where it was written, the value seen, what is accepted and the nearest key."""

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Iterator

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_ext.config.schema import RunConfig
from megatron_ext.config.tree import ConfigTree, KeyPath
from megatron_ext.errors import ConfigError
from megatron_ext.option_rules import OptionError, Problem, one_of

_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")
_MISSING_KEY = ("missing", "missing_argument")


def problems_of(error: ValidationError) -> Iterator[Problem]:
    """The problems that pydantic collected, with keys as dotted paths from the root."""
    for detail in error.errors():
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, OptionError):
            yield from (problem._replace(key=_dotted((*detail["loc"], problem.key))) for problem in cause.problems)
        else:
            yield Problem(_dotted(detail["loc"]), detail["input"], _accepted(detail))


def config_error(problems: Iterable[Problem], tree: ConfigTree) -> ConfigError:
    """One error for all ``problems``, each with the place in the file or on the command line."""
    return ConfigError("\n".join(f"{_place(problem.key, tree)}{problem}" for problem in problems))


def _accepted(detail: ErrorDetails) -> str:
    loc = detail["loc"]
    if detail["type"] in _UNKNOWN_KEY:
        return f"no such key; the keys here are {_known_keys(loc)}"
    if detail["type"] in _MISSING_KEY:
        return "a value, it has no default"
    if detail["type"] == "literal_error":
        names = detail["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        return one_of(names, str(detail["input"]))
    return detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")


def _known_keys(loc: KeyPath) -> str:
    """The keys that may stand beside the last of ``loc``, and the nearest of them, or else of all."""
    name = str(loc[-1])
    section = tuple("*" if isinstance(key, int) else key for key in loc[:-1])
    paths = list(_key_paths(RunConfig))
    here = one_of((path[-1] for path in paths if path[:-1] == section), name)
    if "; nearest: " in here:
        return here
    elsewhere = {path[-1]: _dotted(path) for path in reversed(paths)}
    nearest = difflib.get_close_matches(name, elsewhere, n=1)
    return here + (f"; nearest: {elsewhere[nearest[0]]}" if nearest else "")


def _key_paths(owner: type, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key path that the configuration knows, with ``*`` for the index of a list item."""
    names = RunConfig.model_fields if owner is RunConfig else [field.name for field in dataclasses.fields(owner)]
    hints = typing.get_type_hints(owner)
    for name in names:
        yield (*prefix, name)
        for suffix, section in _sections(hints[name]):
            yield from _key_paths(section, (*prefix, name, *suffix))


def _sections(hint: typing.Any) -> Iterator[tuple[tuple[str, ...], type]]:
    if dataclasses.is_dataclass(hint):
        yield (), hint
    for inner in typing.get_args(hint):
        index = ("*",) if typing.get_origin(hint) is list else ()
        yield from ((index + suffix, section) for suffix, section in _sections(inner))


def _dotted(path: Iterable[str | int]) -> str:
    return ".".join(map(str, path))


def _place(dotted: str, tree: ConfigTree) -> str:
    path = tuple(int(name) if name.isdigit() else name for name in dotted.split("."))
    origin = tree.origin(path)
    return f"{origin}: " if origin else ""
