"""Reads ``events.jsonl``: what happened to a run, in the order in which it happened, also what a later start undid."""

from collections.abc import Sequence
from pathlib import Path

from megatron_ext.errors import DataError
from megatron_ext.report.lines import last_objects, parse_lines, read_lines
from megatron_ext.report.records import EventRecord, parse_record

EVENTS_FILE = "events.jsonl"
STARTS = ("start", "restart")
"""Events with which ranks begin to train: the first time in a directory, and every later time."""


def read_events(run_dir: Path) -> list[EventRecord]:
    """The events of a run; none of one of an old version, which wrote them into metrics.jsonl.

    A last line that was cut off while it was written is left out.

    Raises:
        DataError: a line is no event; names the file and the line.
    """
    path = Path(run_dir) / EVENTS_FILE
    if not path.exists():
        return []
    lines, _ = read_lines(path)
    events = list(parse_lines(lines, path))
    for number, event in enumerate(events, start=1):
        if not isinstance(event, EventRecord):
            raise DataError(f"{path}:{number}: not an event; the line is {lines[number - 1][:80]!r}")
    return events


def latest_events(run_dir: Path) -> list[EventRecord]:
    """Events that stand, without reading all metrics: of an old version's run, those at the end of them. Raises DataError."""
    path = Path(run_dir) / "metrics.jsonl"
    try:
        old = [parse_record(line) for line in last_objects(path) if line.get("kind") == "event"]
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: a line near its end is not a record of metrics: {error}") from None
    return standing([*old, *read_events(run_dir)])


def standing(events: Sequence[EventRecord]) -> list[EventRecord]:
    """Events of steps that count: not those after the step from which a later start, or a run that went back to it, computed again."""
    kept: list[EventRecord] = []
    for event in events:
        if event.event in (*STARTS, "rollback"):
            kept = [old for old in kept if old.step <= event.step]
        kept.append(event)
    return kept
