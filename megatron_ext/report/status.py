"""How a run stands, from its directory alone, while it trains or later."""

import math
import os
import socket
import statistics
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from megatron_ext.errors import DataError
from megatron_ext.report.events import STARTS, read_events, standing
from megatron_ext.report.lines import last_objects, parse_lines
from megatron_ext.report.records import EvalRecord, EventRecord, Record, StartRecord, TrainRecord, parse_record

State = Literal["running", "finished", "stopped", "failed", "stale"]
"""``stale``: nothing says that it ended, but it has not written for far longer than a step takes."""
FAILURES = ("failure", "hang", "silence")
LEAST_SECONDS, STEPS = 120.0, 20
"""A run is stale after so many seconds, or so many median steps if they take longer, without a record."""
RECENT = 100
"""Steps that rates are of."""


@dataclass(frozen=True)
class Status:
    """What can be told of a run. Times are of Unix, in seconds; NaN where nothing is known."""

    directory: str
    state: State
    why: str
    step: int
    total_steps: int
    tokens: int
    loss: float
    losses: dict[str, float]
    """Of the last evaluation of each source."""
    tokens_per_second: float
    step_seconds: float
    """Of the clock, with everything that happens between steps."""
    remaining_seconds: float
    """At the pace of the last steps; NaN for a run that does not run."""
    last_record: float
    """When the run last wrote."""
    checkpoint: str | None
    checkpoint_step: int
    checkpoint_time: float
    skipped_steps: int
    starts: int
    slow_ranks: dict[str, int]
    """Slow steps by rank, since the last start."""
    slowest: str
    """Of the last step: the slowest rank and its ratio to the median."""
    events: list[EventRecord] = field(default_factory=list)
    """The last of them."""


@dataclass(frozen=True)
class _Written:
    """What was read of a run."""

    records: list[Record]
    events: list[EventRecord]

    @property
    def train(self) -> list[TrainRecord]:
        return [record for record in self.records if isinstance(record, TrainRecord)]

    @property
    def start(self) -> StartRecord:
        return next(record for record in reversed(self.records) if isinstance(record, StartRecord))


def read_status(directory: str | Path, now: float, most_events: int = 8) -> Status:
    """The status of a run at ``now``.

    Raises:
        DataError: it is no run directory, or what is written there cannot be read; names the file.
    """
    directory = Path(directory)
    written = _read(directory)
    train, events = written.train, written.events
    start, last = written.start, train[-1] if train else None
    total = next((event.details["total_steps"] for event in reversed(events) if "total_steps" in event.details), start.total_steps)
    between = _seconds_between(train)
    last_record = max((record.time for record in [*written.records, *events] if math.isfinite(record.time)), default=math.nan)
    state, why = _state(events, last.step if last else start.step, total, now - last_record, between)
    checkpoint, checkpoint_step, checkpoint_time = _newest_checkpoint(directory, events)
    step = last.step if last else start.step
    return Status(
        directory=str(directory),
        state=state,
        why=why,
        step=step,
        total_steps=total,
        tokens=last.tokens if last else 0,
        loss=last.loss if last else math.nan,
        losses={record.source: record.loss for record in written.records if isinstance(record, EvalRecord)},
        tokens_per_second=statistics.median(record.tokens_per_second for record in train[-RECENT:]) if train else math.nan,
        step_seconds=between,
        remaining_seconds=(total - step) * between if state == "running" else math.nan,
        last_record=last_record,
        checkpoint=checkpoint,
        checkpoint_step=checkpoint_step,
        checkpoint_time=checkpoint_time,
        skipped_steps=last.skipped_steps if last else 0,
        starts=max(1, sum(event.event in STARTS for event in events)),
        slow_ranks=last.slow_steps if last else {},
        slowest=f"rank {last.slowest_rank}: {last.slowest_ratio:.2f} x the median" if last and last.slowest_ratio > 0 else "",
        events=events[-most_events:],
    )


def _read(directory: Path) -> _Written:
    """Events whole; of the metrics the first line and the last ones."""
    if not directory.is_dir():
        raise DataError(f"{directory}: no such run directory; expected a directory with metrics.jsonl")
    path = directory / "metrics.jsonl"
    try:
        with open(path, "rb") as file:
            first = file.readline()
        records = [*parse_lines([first.rstrip(b"\n")], path)] if first.endswith(b"\n") else []
        records += [parse_record(line) for line in last_objects(path)]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; a run writes its records there when it starts") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path}: a line near its end is not a record of metrics: {error}") from None
    if not records or not isinstance(records[0], StartRecord):
        raise DataError(f"{path}:1: the first record must be of kind 'start'")
    old = [record for record in records if isinstance(record, EventRecord)]
    return _Written(records, [*old, *read_events(directory)])


def _newest_checkpoint(directory: Path, events: list[EventRecord]) -> tuple[str | None, int, float]:
    """Name, step and time. A run may be killed after ``latest`` has moved and before it tells; what it told counts without ``latest``."""
    pointer = directory / "checkpoints" / "latest"
    try:
        name = pointer.read_text("utf-8").strip()
        return name, int(name.removeprefix("step_")), pointer.stat().st_mtime
    except (OSError, ValueError):
        saves = [event for event in standing(events) if event.event == "save"]
        path = saves[-1].details.get("path") if saves else None
        return Path(path).name if path else None, saves[-1].step if saves else 0, saves[-1].time if saves else math.nan


def _seconds_between(train: list[TrainRecord]) -> float:
    """Mean time from one of the last steps to the next, without times in which nothing ran; NaN before the second step."""
    times = [second.time - first.time for first, second in pairwise(train[-RECENT:]) if second.step == first.step + 1]
    if not times:
        return train[-1].step_seconds if train else math.nan
    usual = statistics.median(times)
    return statistics.fmean(value for value in times if value <= 10 * usual + 60)


def _state(events: list[EventRecord], step: int, total: int, silence: float, between: float) -> tuple[State, str]:
    begin = max((place for place, event in enumerate(events) if event.event in STARTS), default=0)
    for event in reversed(events[begin:]):
        if event.event in FAILURES:
            return "failed", f"{event.event} of rank {event.details.get('rank', '?')}: {event.details.get('what', '')}"
        if event.event == "finish" or (event.event == "save" and event.step >= total):
            return "finished", f"step {event.step} of {total} is saved"
        if event.event == "stop":
            return "stopped", f"on request after step {event.step}"
    owner = next((event.details for event in reversed(events) if event.event in STARTS), {})
    alive = _lives(owner)
    if alive is False:
        return "failed", f"process {owner['pid']} on this host is gone without having said why"
    most = max(LEAST_SECONDS, STEPS * between if math.isfinite(between) else 0.0)
    if silence > most:
        lives = f", though process {owner['pid']} on this host lives" if alive else ""
        return "stale", f"no record for {silence:.0f} s, after step {step}{lives}"
    return "running", f"process {owner['pid']} on this host lives" if alive else f"it wrote {max(0.0, silence):.0f} s ago"


def _lives(owner: dict[str, Any]) -> bool | None:
    """Whether the process that wrote the event of a start lives; None if that cannot be known here."""
    if owner.get("host") != socket.gethostname() or owner.get("boot") != boot() or not isinstance(owner.get("pid"), int):
        return None
    return process_start(owner["pid"]) == owner.get("process_start")


def boot() -> str | None:
    """What tells one start of this machine's kernel, and one container, from another; None where there is no /proc."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text('ascii').strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def process_start(pid: int) -> int | None:
    """When a process of this machine started, in ticks since the kernel did; None if there is none, or only what is left of one."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace").rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])
