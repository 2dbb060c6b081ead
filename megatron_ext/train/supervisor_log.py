"""What a supervisor says and reads: the console, supervisor.jsonl, and how far the metrics of its run have come."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ext.errors import StorageError
from megatron_ext.json_text import parse_json
from megatron_ext.train.console import say
from megatron_ext.train.record_file import RecordFile

LOG_FILE = "supervisor.jsonl"
TAIL_BYTES = 1 << 20
"""Of the metrics, in which the last step is looked for."""


class SupervisorLog:
    """What the supervisor does, on the console and in supervisor.jsonl. Where neither can be written, the run goes on all the same."""

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = RecordFile(run_dir / LOG_FILE, shared=True)
        self._said: set[str] = set()

    def event(self, event: str, message: str, **fields: Any) -> None:
        """Print ``message`` and append a record with ``fields``."""
        say(f"supervisor: {message}")
        try:
            self._file.write({"event": event, "time": time.time(), "message": message, **fields})
        except (OSError, StorageError) as error:
            self.once(f"{error}")

    def once(self, message: str) -> None:
        """Print ``message`` unless it was printed before."""
        if message not in self._said:
            self._said.add(message)
            say(f"supervisor: {message}")


def last_step(metrics: Path, tell: Callable[[str], None] = say) -> int:
    """The last step in the metrics of a run, also while or after its last line was cut off; 0 without one.

    Args:
        metrics: the file.
        tell: gets what is to be said of lines that cannot be read, and are passed over.
    """
    if not metrics.exists():
        return 0
    with open(metrics, "rb") as file:
        file.seek(max(0, metrics.stat().st_size - TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]
    for line in reversed(lines):
        if line.startswith(b'{"kind": "train"'):
            try:
                return int(parse_json(line)["step"])
            except (ValueError, KeyError, TypeError):
                tell(f"{metrics}: a line near its end cannot be read, and is passed over: {line[:80]!r}")
    return 0
