"""Writes events.jsonl: what happens to a run, one JSON object a line, never dropped."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO, Any

from megatron_ext.report.events import EVENTS_FILE, STARTS, read_events
from megatron_ext.report.status import boot, process_start


def append_event(run_dir: str | Path, event: str, **values: Any) -> None:
    """Add an event to those of the run in ``run_dir``. Several processes may, also on several hosts.

    Args:
        run_dir: the directory of the run.
        event: its name.
        values: ``step`` (of the last update that was done) and what else readers should know, as JSON.
    """
    line = json.dumps({"kind": "event", "event": event, "time": time.time(), **values}) + "\n"
    with open(Path(run_dir) / EVENTS_FILE, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _cut_torn_line(file)
        file.write(line.encode())


def start_event(run_dir: Path) -> dict[str, Any]:
    """What the event of a start says of this process; called on the one that writes it: which start it is of this directory, and where."""
    number = 1 + sum(event.event in STARTS for event in read_events(run_dir))
    process = {"pid": os.getpid(), "process_start": process_start(os.getpid()), "boot": boot()}
    return {"event": STARTS[number > 1], "number": number, "host": socket.gethostname(), **process}


def _cut_torn_line(file: IO[bytes]) -> None:
    """Remove what a writer that was killed left behind the last newline."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
