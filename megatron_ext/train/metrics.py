"""metrics.jsonl: one JSON object a line for every step and evaluation of a run; events.jsonl for what happens to it. Rank 0 writes them."""

import json
import logging
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_ext.atomic_io import atomic_open
from megatron_ext.errors import DataError
from megatron_ext.json_text import parse_json
from megatron_ext.option_rules import shown
from megatron_ext.train.events import append_event

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends records to the metrics of a run, and events to its events.

    Args:
        run_dir: where both files lie.
        step: metrics of later steps are dropped: a resumed run computes those steps again. Events stay: they happened.
        active: False on ranks that do not write.
        name: of the file of metrics.
    """

    def __init__(self, run_dir: Path, step: int, active: bool, name: str = METRICS_FILE) -> None:
        self._run_dir, self._file = run_dir, None
        if active:
            path = run_dir / name
            _drop_after(path, step)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run

    def write(self, kind: str, **values: Any) -> None:
        """Append one record and flush it; one of kind ``event`` to events.jsonl, and on all ranks to their logs."""
        if kind == "event":
            logging.getLogger(__name__).info("event %s", values["event"], extra={"details": values})
        if self._file is not None and kind == "event":
            append_event(self._run_dir, **values)
        elif self._file is not None:
            self._file.write(json.dumps({"kind": kind, "time": time.time(), **values}) + "\n")
            self._file.flush()

    def go_back(self, step: int) -> None:
        """Drop the metrics of steps after ``step``, which the run goes back to: it computes them again."""
        if self._file is not None:
            self._file.close()
            _drop_after(self._run_dir / METRICS_FILE, step)
            self._file = open(self._run_dir / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    with open(path, "rb") as old, atomic_open(path, "wb") as new:
        for number, line in enumerate(old, start=1):
            # A line without its end was cut off when the run was killed; its step is computed again.
            if step > 0 and line.endswith(b"\n") and 0 <= _step_of(line, f"{path}:{number}") <= step:
                new.write(line)


def _step_of(line: bytes, place: str) -> int:
    try:
        step = parse_json(line)["step"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place}: {line[:80]!r} is no record ({error}); accepted: lines as the run wrote them, or no file") from error
    if not isinstance(step, int):
        raise DataError(f"{place}: step is {shown(step)}; accepted: a whole number")
    return step


def length_histogram(lengths: Iterable[int]) -> dict[str, int]:
    """Number of documents by length: key k, a power of two, counts those of more than k / 2 and at most k tokens."""
    counts = Counter(1 << (length - 1).bit_length() for length in lengths)
    return {str(key): counts[key] for key in sorted(counts)}
