"""metrics.jsonl: one JSON object a line for every step and evaluation of a run; events.jsonl for what happens to it. Rank 0 writes them."""

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
from megatron_ext.train.events import event_file, event_record
from megatron_ext.train.record_file import RecordFile, storing

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends records to the metrics of a run, and events to its events.

    Args:
        run_dir: where both files lie.
        step: metrics of later steps are dropped: a resumed run computes those steps again. Events stay: they happened.
        active: False on ranks that do not write.
        name: of the file of metrics.

    Raises:
        StorageError: metrics that are to be dropped cannot be.
    """

    def __init__(self, run_dir: Path, step: int, active: bool, name: str = METRICS_FILE) -> None:
        self._active, self._path = active, run_dir / name
        self._metrics, self._events = RecordFile(self._path), event_file(run_dir)
        if active:
            _drop_after(self._path, step)

    def write(self, kind: str, **values: Any) -> None:
        """Append one record; one of kind ``event`` to events.jsonl, and on all ranks to their logs.

        Raises:
            StorageError: see ``RecordFile.write_line``.
        """
        if kind == "event":
            logging.getLogger(__name__).info("event %s", values["event"], extra={"details": values})
        if self._active and kind == "event":
            self._events.write(event_record(**values))
        elif self._active:
            self._metrics.write({"kind": kind, "time": time.time(), **values})

    def flush(self) -> None:
        """Put on disk what was written. Raises StorageError if that cannot be."""
        for file in (self._metrics, self._events):
            file.flush()

    def go_back(self, step: int) -> None:
        """Drop the metrics of steps after ``step``, which the run goes back to: it computes them again."""
        if self._active:
            self._metrics.flush()
            _drop_after(self._path, step)


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    with storing(path), open(path, "rb") as old, atomic_open(path, "wb") as new:
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
