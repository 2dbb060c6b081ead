"""Show how far preprocessing is: a bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from megatron_ext.data.preprocess import Summary

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def show_progress(console: Console) -> Iterator[Callable[[Summary], None]]:
    """A function to call with the summary as it grows; documents and tokens a second, and the time left by bytes of input."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("ETA"), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda summary: bar.update(task, total=summary.total_bytes, completed=summary.done_bytes, description=_rates(summary))


class _Lines:
    """Prints a line every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next = time.monotonic() + SECONDS_BETWEEN_LINES

    def __call__(self, summary: Summary) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + SECONDS_BETWEEN_LINES
        share = summary.done_bytes / max(summary.total_bytes, 1)
        left = summary.seconds / share - summary.seconds if share else float("inf")
        self._console.print(f"{share:6.1%}  {_rates(summary)}  ETA {left:,.0f} s", highlight=False)


def _rates(summary: Summary) -> str:
    seconds = max(summary.seconds, 1e-9)
    return f"{summary.documents:,} documents  {summary.documents / seconds:,.0f} documents/s  {summary.tokens / seconds:,.0f} tokens/s"
