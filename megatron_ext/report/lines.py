"""Files of one JSON record a line, which may be written to while they are read."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_ext.errors import DataError
from megatron_ext.json_text import parse_json
from megatron_ext.report.records import Record, parse_record


def read_lines(path: Path) -> tuple[list[bytes], bool]:
    """The lines of a file, without a last one that has neither a newline nor the end of its JSON object; and whether there was one."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; a run writes its records there") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    *lines, last = content.split(b"\n")
    if not last:
        return lines, False
    try:
        parse_json(last)
    except ValueError:
        return lines, True
    return [*lines, last], False


def last_objects(path: Path, most_bytes: int = 1 << 18) -> Iterator[dict[str, Any]]:
    """The whole JSON objects at the end of a file; none of one that does not exist.

    Raises:
        ValueError: a line is no JSON.
    """
    try:
        with open(path, "rb") as file:
            begin = max(0, file.seek(0, os.SEEK_END) - most_bytes)
            file.seek(begin)
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return
    # Without a first line that lost its beginning, and what follows the last newline.
    yield from map(parse_json, lines[bool(begin) : -1])


def parse_lines(lines: list[bytes], path: Path) -> Iterator[Record]:
    """The records of lines of ``path``, from its first.

    Raises:
        DataError: a line is not a record; names the file and the line.
    """
    for number, line in enumerate(lines, start=1):
        try:
            yield parse_record(parse_json(line))
        except ValueError as error:
            raise DataError(f"{path}:{number}: not a record of metrics: {error}; the line is {line[:80]!r}") from None
