"""What a person sees of a run: a banner, then one aligned line a log step."""

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, TextIO


class Console:
    """Prints on rank 0 and nowhere else.

    Args:
        active: False on ranks that do not print.
        total_steps: steps of the run.
    """

    def __init__(self, active: bool, total_steps: int) -> None:
        self._active = active
        self._total = total_steps
        self._since = time.perf_counter()
        self._steps = 0
        self._tokens = 0

    def say(self, text: str) -> None:
        """One line at once, also into a pipe."""
        if self._active:
            say(text)

    def banner(self, rows: Mapping[str, str]) -> None:
        """Names and values, aligned."""
        width = max(map(len, rows))
        for name, value in rows.items():
            self.say(f"  {name:<{width}}  {value}")

    def start_clock(self) -> None:
        """Begin the interval that the next line's rates refer to."""
        self._since, self._steps, self._tokens = time.perf_counter(), 0, 0

    def count(self, tokens: int) -> None:
        """Count a step towards the rates of the next line."""
        self._steps += 1
        self._tokens += tokens

    def step_line(self, record: Mapping[str, Any], flops_per_token: float) -> None:
        """The line of a log step. Rates are those since the last line, and so is the time that the rest is expected to take."""
        elapsed = max(1e-9, time.perf_counter() - self._since)
        rate = self._tokens / elapsed
        step = record["step"]
        eta = timedelta(seconds=round((self._total - step) * elapsed / max(1, self._steps)))
        width = len(str(self._total))
        self.say(
            f"step {step:>{width}}/{self._total} {step / self._total:>4.0%} | loss {record['loss']:7.4f} | lr {record['lr']:.2e} | "
            f"grad norm {record['grad_norm']:7.3f} | {rate:>9,.0f} tokens/s | {rate * flops_per_token / 1e12:7.3f} TFLOP/s | "
            f"{record['memory_gib']:6.2f} GiB | ETA {eta} | skipped {record['skipped_steps']}"
            + (f" | went back {record['rollbacks']}" if record.get("rollbacks") else "")
        )
        self.start_clock()


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line at once, on the standard output or on ``stream``. A screen that is full or gone must not end a run."""
    try:
        print(text, file=stream, flush=True)
    except OSError:
        return
