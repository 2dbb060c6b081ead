#!/usr/bin/env python3
"""Print how a run stands, from its directory alone.

    python tools/status.py runs/mine --follow

The exit status says the state: 0 finished, 10 running, 11 stopped on request, 12 failed, 13 stale (nothing says that it ended, but it has
not written for far longer than a step takes); 1 if the directory is no run's, 2 if the arguments are wrong.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megatron_ext.errors import DataError
from megatron_ext.report import formats
from megatron_ext.report.status import State, Status, read_status

EXIT_STATUS: Mapping[State, int] = MappingProxyType({"finished": 0, "running": 10, "stopped": 11, "failed": 12, "stale": 13})
COLORS: Mapping[State, str] = MappingProxyType(
    {"finished": "green", "running": "cyan", "stopped": "yellow", "failed": "red", "stale": "red"}
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; the result is its exit status."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        status = read_status(options.run, time.time())
        if options.follow and not options.json:
            status = _follow(options.run, status, options.interval, console)
        elif options.json:
            print(json.dumps(as_json(status)))
        else:
            console.print(table(status, time.time()))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return EXIT_STATUS[status.state]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--follow", action="store_true", help="until the run does not run any more, or Ctrl-C")
    parser.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="between looks of --follow (default: 2)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table; what is not known is null")
    return parser


def _follow(run: Path, status: Status, interval: float, console: Console) -> Status:
    try:
        with Live(table(status, time.time()), console=console, auto_refresh=False) as live:
            while status.state == "running":
                time.sleep(interval)
                status = read_status(run, time.time())
                live.update(table(status, time.time()), refresh=True)
    except KeyboardInterrupt:
        pass
    return status


def as_json(status: Status) -> dict[str, object]:
    """Every field, with null for what is not known."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in dataclasses.asdict(status).items()
    }


def table(status: Status, now: float) -> Table:
    """The status as rows of a name and a value."""
    shown = Table(box=box.SIMPLE, show_header=False, pad_edge=False, title=status.directory, title_justify="left")
    shown.add_column(style="bold", no_wrap=True)
    shown.add_column()
    shown.add_row("state", Text(f"{status.state}: {status.why}", style=COLORS[status.state]))
    for name, value in _rows(status, now).items():
        shown.add_row(name, Text(value))
    for number, event in enumerate(status.events):
        details = ", ".join(f"{key} {value}" for key, value in event.details.items() if isinstance(value, str | int) and key != "tokens")
        shown.add_row("" if number else "events", Text(f"{formats.moment(event.time)}  step {event.step}  {event.event}  {details}"[:160]))
    return shown


def _rows(status: Status, now: float) -> dict[str, str]:
    share = f" ({100 * status.step / status.total_steps:.0f} %)" if status.total_steps else ""
    rows = {
        "step": f"{status.step:,} of {status.total_steps:,}{share}",
        "time left": formats.duration(status.remaining_seconds),
        "training loss": formats.loss(status.loss),
        "validation": ", ".join(f"{source} {formats.loss(loss)}" for source, loss in status.losses.items()),
        "tokens": formats.count(status.tokens),
        "tokens per second": formats.count(status.tokens_per_second),
        "last written": f"{formats.duration(now - status.last_record)} ago" if math.isfinite(status.last_record) else "n/a",
        "checkpoint": "none",
        "skipped steps": str(status.skipped_steps),
        "starts": str(status.starts),
        "slowest rank": status.slowest,
        "slow steps": ", ".join(f"rank {rank}: {count}" for rank, count in status.slow_ranks.items()),
    }
    if status.checkpoint:
        rows["checkpoint"] = f"{status.checkpoint}, {formats.duration(now - status.checkpoint_time)} old"
    return {name: value for name, value in rows.items() if value and value != "n/a"}


if __name__ == "__main__":
    sys.exit(main())
