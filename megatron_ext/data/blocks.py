"""Parts of input files that are small enough to pass around, and the documents in them.

A block holds raw bytes: cutting a file into blocks is cheap, and another process can do the work of parsing them.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

TEXT = tuple[str, ...]
"""The texts of one document, one for each key that was asked for."""


@dataclass(frozen=True)
class Fault:
    """Input that cannot be read as a document: where, and what is wrong with it."""

    path: str
    place: str
    """``line 3``, ``row 3`` or empty if it concerns the whole file."""
    reason: str

    def __str__(self) -> str:
        return f"{self.path}{', ' if self.place else ''}{self.place}: {self.reason}"


@dataclass(frozen=True)
class Block(ABC):
    """A part of an input file."""

    path: str
    size: int
    """Bytes of the file that this block stands for; those of all blocks of a file sum to its size."""

    @abstractmethod
    def documents(self, keys: Sequence[str]) -> Iterator[TEXT | Fault]:
        """The documents in order, with a fault in the place of each that cannot be read.

        Args:
            keys: fields of a record; plain text has one field, whatever its key.
        """


@dataclass(frozen=True)
class BrokenBlock(Block):
    """What cannot be cut into blocks."""

    fault: Fault

    def documents(self, keys: Sequence[str]) -> Iterator[TEXT | Fault]:
        yield self.fault


@dataclass(frozen=True)
class JsonLinesBlock(Block):
    """Whole lines of a JSON lines file."""

    first_line: int
    """Number of the first, counted from 1."""
    content: bytes

    def documents(self, keys: Sequence[str]) -> Iterator[TEXT | Fault]:
        lines = self.content.split(b"\n")
        if not lines[-1]:
            lines.pop()  # the file's last newline ends a line and does not begin one
        for number, line in enumerate(lines, self.first_line):
            try:
                yield _record(line, keys)
            except _Unreadable as error:
                yield Fault(self.path, f"line {number}", str(error))


@dataclass(frozen=True)
class RowsBlock(Block):
    """Rows of a table."""

    first_row: int
    """Number of the first, counted from 1."""
    columns: tuple[Sequence[bytes | None], ...]
    """UTF-8 text of each row, by key."""

    def documents(self, keys: Sequence[str]) -> Iterator[TEXT | Fault]:
        for number, row in enumerate(zip(*self.columns, strict=True), self.first_row):
            try:
                yield tuple(_cell(value, key) for value, key in zip(row, keys, strict=True))
            except _Unreadable as error:
                yield Fault(self.path, f"row {number}", str(error))


@dataclass(frozen=True)
class PlainTextBlock(Block):
    """A whole text file, which is one document."""

    content: bytes

    def documents(self, keys: Sequence[str]) -> Iterator[TEXT | Fault]:
        if len(keys) != 1:
            yield Fault(self.path, "", f"plain text is one field, expected a file with the keys {', '.join(keys)}")
            return
        try:
            yield (self.content.decode("utf-8"),)
        except UnicodeDecodeError as error:
            line = self.content.count(b"\n", 0, error.start) + 1
            yield Fault(self.path, f"line {line}", f"{_describe(error)}, expected plain text")


class _Unreadable(Exception):
    """Why a record is no document."""


def _record(line: bytes, keys: Sequence[str]) -> TEXT:
    """The texts of one line; those of a blank line are empty."""
    if not line.strip():
        return ("",) * len(keys)
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _Unreadable(_describe(error)) from error
    except json.JSONDecodeError as error:
        raise _Unreadable(f"bad JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise _Unreadable(f"bad JSON: {error}") from error
    if not isinstance(record, dict):
        raise _Unreadable(f"{type(record).__name__}, expected a JSON object with the key {', '.join(keys)}")
    return tuple(_field(record, key) for key in keys)


def _field(record: dict[str, object], key: str) -> str:
    if key not in record:
        raise _Unreadable(f"no key {key!r}, the record has {', '.join(map(repr, record)) or 'none'}")
    value = record[key]
    if not isinstance(value, str):
        raise _Unreadable(f"{key!r} is {json.dumps(value)[:40]}, expected a string")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _Unreadable(f"{key!r} is not Unicode text: lone surrogate {value[error.start]!a} at character {error.start}") from error
    return value


def _cell(value: bytes | None, key: str) -> str:
    if value is None:
        raise _Unreadable(f"{key!r} is null, expected a string")
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Unreadable(f"{key!r}: {_describe(error)}") from error


def _describe(error: UnicodeDecodeError) -> str:
    return f"invalid UTF-8 at byte {error.start} ({error.object[error.start : error.start + 4].hex(' ')})"
