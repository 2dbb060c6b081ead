"""logs/rank_00003.jsonl in the run directory: what a rank has to say, one JSON object a line, through Python's logging."""

import json
import logging
import socket
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_ext.errors import StorageError
from megatron_ext.parallel.world import World
from megatron_ext.train.console import say
from megatron_ext.train.record_file import RecordFile

LOGS = "logs"
OURS = "megatron_ext"


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time, level, rank, host, step, logger, message; ``details`` and the traceback where it has them.

    Args:
        world: the ranks; its activity knows the step.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world, self._host = world, socket.gethostname()

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, Any] = {
            "time": record.created,
            "level": record.levelname,
            "rank": self._world.rank,
            "host": self._host,
            "step": self._world.activity.now.step,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if details := getattr(record, "details", None):
            line["details"] = details
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, default=str)


class RecordHandler(logging.Handler):
    """Writes every record to a file as its formatter makes it."""

    def __init__(self, file: RecordFile) -> None:
        super().__init__()
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        """Append the record. What cannot be logged must not end what logs it."""
        try:
            self._file.write_line(self.format(record))
        except Exception:
            self.handleError(record)


class RankLog:
    """While it is entered, the log of this rank takes what this package and, from warnings on, what libraries log.

    Python's warnings too. What libraries log goes to the screen as it would without this.

    Args:
        run_dir: of the run; the log is appended to.
        world: the ranks.
    """

    def __init__(self, run_dir: Path, world: World) -> None:
        self._file = RecordFile(log_path(run_dir, world.rank))
        to_file = RecordHandler(self._file)
        to_file.setFormatter(JsonFormatter(world))
        self._screen = logging.StreamHandler(sys.stderr)
        self._screen.setLevel(logging.WARNING)
        self._screen.addFilter(lambda record: not f"{record.name}.".startswith(f"{OURS}."))
        self._handlers = [to_file, self._screen]

    def __enter__(self) -> Self:
        for handler in self._handlers:
            logging.getLogger().addHandler(handler)
        self._level = logging.getLogger(OURS).level
        logging.getLogger(OURS).setLevel(logging.INFO)
        logging.captureWarnings(True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            logging.getLogger(__name__).error("%s: %s", type(error).__name__, error, exc_info=error)
        logging.captureWarnings(False)
        logging.getLogger(OURS).setLevel(self._level)
        for handler in self._handlers:
            logging.getLogger().removeHandler(handler)
            handler.flush()
        try:
            self._file.flush()
        except StorageError as failed:
            # The run has ended, and an error that it ended by must not be hidden.
            say(f"{failed}, and they are lost", sys.stderr)


def log_path(run_dir: Path, rank: int) -> Path:
    """Where the log of a rank lies."""
    return run_dir / LOGS / f"rank_{rank:05d}.jsonl"
