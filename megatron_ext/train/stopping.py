"""Stopping a run in good order: a signal or a file asks, the end of a step answers."""

import signal
from pathlib import Path
from types import FrameType

STOP_FILE = "stop"


class StopRequest:
    """Notes the first SIGTERM or SIGINT, or the file that ``tools/stop.py`` leaves in the run directory.

    One rank may be asked and another not, so the flag is summed over the ranks with the losses of each step. Repeated signals change
    nothing: a launcher that loses patience must not cut short a save that is under way.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / STOP_FILE
        self._signal: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or signal.Signals(number).name

    @property
    def reason(self) -> str | None:
        """Who asked this rank to stop; None if nobody did."""
        if self._signal is None and self._file.exists():
            return f"the file {self._file}"
        return self._signal


def forget_request(run_dir: Path) -> None:
    """Remove the file that stopped the run last time, before any rank looks for it."""
    (run_dir / STOP_FILE).unlink(missing_ok=True)


def request_stop(run_dir: Path) -> Path:
    """Ask the run in ``run_dir`` to save a checkpoint at the end of its step and exit; returns the file that asks.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    path = run_dir / STOP_FILE
    path.touch()
    return path
