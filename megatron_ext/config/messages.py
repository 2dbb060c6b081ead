"""What pydantic finds wrong, in words: dotted path, place in the file, value seen, what is accepted and the nearest key."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_ext.config.schema import RunConfig
from megatron_ext.option_rules import OptionError, Problem, one_of, shown

_ACCEPTED = {
    "bool_type": "true or false",
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a section of keys",
    "dataclass_type": "a section of keys",
    "model_type": "a section of keys",
}


def problems_of(error: ValidationError) -> Iterator[Problem]:
    """Every problem that pydantic collected, its key a dotted path from the root."""
    for detail in error.errors():
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, OptionError):
            yield from (problem._replace(key=_dotted((*detail["loc"], problem.key))) for problem in cause.problems)
        else:
            yield _problem(detail)


def _problem(detail: ErrorDetails) -> Problem:
    path, found = detail["loc"], shown(detail["input"])
    match detail["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            return Problem(_dotted(path), f"no such key (its value: {found})", _keys_beside(path))
        case "missing" | "missing_argument":
            return Problem(_dotted(path), "not set", "a value, because there is no default")
        case "literal_error":
            names = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
            return Problem(_dotted(path), found, one_of(names, str(detail["input"])))
        case kind:
            return Problem(_dotted(path), found, _ACCEPTED.get(kind) or detail["msg"].removeprefix("Input should be "))


def _keys_beside(path: tuple[str | int, ...]) -> str:
    """The keys that may stand where ``path`` ends, and the key nearest to its last: one of them, or else one of another section."""
    name = str(path[-1])
    section = tuple("*" if isinstance(key, int) else key for key in path[:-1])
    known = list(_key_paths(RunConfig))
    here = [key for *owner, key in known if tuple(owner) == section]
    elsewhere = {key: _dotted((*owner, key)) for *owner, key in reversed(known)}
    nearest = difflib.get_close_matches(name, elsewhere, n=1)
    if nearest and not difflib.get_close_matches(name, here, n=1):
        return f"{', '.join(here)}; nearest: {elsewhere[nearest[0]]}"
    return one_of(here, name)


def _key_paths(owner: type, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key path of the schema, with ``*`` for the index of a list item."""
    names = RunConfig.model_fields if owner is RunConfig else [field.name for field in dataclasses.fields(owner)]
    hints = typing.get_type_hints(owner)
    for name in names:
        yield (*prefix, name)
        for suffix, section in _sections(hints[name]):
            yield from _key_paths(section, (*prefix, name, *suffix))


def _sections(hint: typing.Any) -> Iterator[tuple[tuple[str, ...], type]]:
    """The dataclasses inside a type such as ``list[SourceOptions]`` or ``ReplayOptions | None``, with the path that leads to them."""
    if dataclasses.is_dataclass(hint):
        yield (), hint
    index = ("*",) if typing.get_origin(hint) is list else ()
    for inner in typing.get_args(hint):
        yield from (((*index, *suffix), section) for suffix, section in _sections(inner))


def _dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))
