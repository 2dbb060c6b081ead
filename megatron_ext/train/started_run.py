"""A run under way as its supervisor sees it: what its ranks print, and their end."""

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import IO

from megatron_ext.train.supervision import RankEnd

TICK_SECONDS = 0.05
LINES_KEPT = 400
READ_SECONDS = 10.0
"""How long the end of what was printed is waited for, after the end of all ranks."""


class StartedRun(ABC):
    """The processes of one start.

    Args:
        say: gets every line that is printed.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.ends: list[RankEnd] = []
        """Of ranks, as they were seen, without those that ``kill`` ended."""
        self.lines: deque[str] = deque(maxlen=LINES_KEPT)
        """The last that were printed."""
        self._say, self._killing = say, False
        self._readers: list[threading.Thread] = []

    def wait(self, grace: float, tick: Callable[[], bool]) -> int:
        """Until all ranks have ended; 0 if all in good order, else a code that is not 0.

        Args:
            grace: seconds that the other ranks have, after one failed, to end and say why. Then they are killed.
            tick: called all the time; true if the run is to be killed now.
        """
        failed_at = None
        while None in (codes := self._poll()):
            now, hurried = time.monotonic(), tick()
            if failed_at is None and (any(codes) or any(end.code for end in list(self.ends))):
                failed_at = now
            if hurried or (failed_at is not None and now > failed_at + grace):
                self.kill()
            time.sleep(TICK_SECONDS)
        for reader in self._readers:
            # What was said last tells why. Something that a rank left behind may hold its output open.
            reader.join(READ_SECONDS)
        return next((code for code in codes if code), 0)

    def kill(self) -> None:
        """End everything now."""
        self._killing = True
        self._end()

    @abstractmethod
    def _poll(self) -> list[int | None]:
        """Exit codes of the processes that are waited for; None for those that run."""

    @abstractmethod
    def _end(self) -> None:
        """Kill all ranks, and wait for their ends."""

    def _read(self, output: IO[bytes], host: str) -> None:
        """Begin to read what is printed on a host."""
        self._readers.append(threading.Thread(target=self._listen, args=(output, host), daemon=True))
        self._readers[-1].start()

    def _listen(self, output: IO[bytes], host: str) -> None:
        with output:
            for line in output:
                self._note(line.decode(errors="replace").rstrip("\n"), host)

    def _note(self, line: str, host: str) -> None:
        self.lines.append(line)
        self._say(line)

    def _note_end(self, end: RankEnd) -> None:
        if not self._killing:
            self.ends.append(end)
