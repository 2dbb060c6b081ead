"""Writes events.jsonl: what happens to a run, one JSON object a line, never dropped."""

import os
import socket
import time
from pathlib import Path
from typing import Any

from megatron_ext.report.events import EVENTS_FILE, STARTS, read_events
from megatron_ext.report.status import boot, process_start
from megatron_ext.train.record_file import RecordFile


def append_event(run_dir: str | Path, event: str, **values: Any) -> None:
    """Add an event to those of the run in ``run_dir``. Several processes may, also on several hosts.

    Args:
        run_dir: the directory of the run.
        event: its name.
        values: ``step`` (of the last update that was done) and what else readers should know, as JSON.

    Raises:
        StorageError: it cannot be written.
    """
    events = event_file(Path(run_dir))
    events.write(event_record(event, **values))
    events.flush()


def event_file(run_dir: Path) -> RecordFile:
    """What the events of a run are written to."""
    return RecordFile(run_dir / EVENTS_FILE, shared=True)


def event_record(event: str, **values: Any) -> dict[str, Any]:
    """An event that happens now; arguments as of ``append_event``."""
    return {"kind": "event", "event": event, "time": time.time(), **values}


def start_event(run_dir: Path) -> dict[str, Any]:
    """What the event of a start says of this process; called on the one that writes it: which start it is of this directory, and where."""
    number = 1 + sum(event.event in STARTS for event in read_events(run_dir))
    process = {"pid": os.getpid(), "process_start": process_start(os.getpid()), "boot": boot()}
    return {"event": STARTS[number > 1], "number": number, "host": socket.gethostname(), **process}
