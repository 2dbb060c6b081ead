"""The state of runs from directories made up for the purpose; the last test has a process that lives and dies."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.errors import DataError
from megatron_ext.report.status import boot, process_start, read_status
from tests.report.fake_runs import evaluation, start, train, write_run

BEGIN = 1.7e9


def event(name: str, step: int, seconds: float, **details: Any) -> dict[str, Any]:
    return {"kind": "event", "event": name, "step": step, "time": BEGIN + seconds, **details}


def run(folder: Path, steps: int, *events: dict[str, Any], **changes: Any) -> Path:
    """A run of 100 steps that has written so many, one in two seconds, and a first event from another host."""
    first = event("start", 0, 0, host="elsewhere", pid=1, total_steps=100)
    directory = write_run(folder / "run", [start(), evaluation(0, "prose", 9.0), *(train(step, **changes) for step in range(1, steps + 1))])
    (directory / "events.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (first, *events)))
    return directory


def test_a_run_that_writes_is_running(tmp_path: Path) -> None:
    saved = event("save", 20, 40, path="somewhere/step_00000020")
    status = read_status(run(tmp_path, 30, saved, slow_steps={"1": 3}, slowest_rank=1, slowest_ratio=1.25), BEGIN + 65)
    assert (status.state, status.why) == ("running", "it wrote 5 s ago")
    assert (status.step, status.total_steps, status.loss, status.losses) == (30, 100, 5.0, {"prose": 9.0})
    assert status.step_seconds == 2.0 and status.remaining_seconds == 140.0 and status.tokens_per_second == 4096.0
    assert (status.checkpoint, status.checkpoint_step, status.checkpoint_time) == ("step_00000020", 20, BEGIN + 40)
    assert status.slow_ranks == {"1": 3} and status.slowest == "rank 1: 1.25 x the median"


@pytest.mark.parametrize(
    ("events", "state", "why"),
    [
        ([event("stop", 30, 61)], "stopped", "on request after step 30"),
        ([event("save", 100, 61), event("finish", 100, 62)], "finished", "step 100 of 100 is saved"),
        ([event("save", 100, 61)], "finished", "step 100 of 100 is saved"),
        ([event("failure", 30, 61, rank=3, what="RuntimeError: oh")], "failed", "failure of rank 3: RuntimeError: oh"),
        ([event("hang", 30, 61, rank=2, what="has not moved")], "failed", "hang of rank 2: has not moved"),
        ([event("stop", 30, 61), event("restart", 30, 62, total_steps=100)], "running", "it wrote 3 s ago"),
        ([event("save", 100, 61), event("restart", 100, 62, total_steps=200)], "running", "it wrote 3 s ago"),
    ],
)
def test_the_last_of_its_events_says_how_it_ended(tmp_path: Path, events: list[dict[str, Any]], state: str, why: str) -> None:
    status = read_status(run(tmp_path, 30, *events), BEGIN + 65)
    assert (status.state, status.why) == (state, why)
    assert math.isnan(status.remaining_seconds) or state == "running"


def test_a_run_that_is_silent_for_many_steps_is_stale(tmp_path: Path) -> None:
    directory = run(tmp_path, 30)
    assert read_status(directory, BEGIN + 60 + 119).state == "running"
    assert (read_status(directory, BEGIN + 60 + 121).state, read_status(directory, BEGIN + 60 + 121).why) == (
        "stale",
        "no record for 121 s, after step 30",
    )


def test_slow_steps_may_be_silent_for_longer(tmp_path: Path) -> None:
    records = [start(), *(train(step, time=BEGIN + 60 * step) for step in range(1, 5))]
    directory = write_run(tmp_path / "run", records)
    assert read_status(directory, BEGIN + 240 + 1100).state == "running"
    assert read_status(directory, BEGIN + 240 + 1300).state == "stale"


def test_old_runs_have_their_events_in_the_metrics(tmp_path: Path) -> None:
    saved = {"kind": "event", "event": "checkpoint", "time": BEGIN + 200, "step": 100, "path": "x/step_00000100"}
    status = read_status(write_run(tmp_path / "run", [start(), train(100), saved]), BEGIN + 1e6)
    assert (status.state, status.checkpoint) == ("finished", "step_00000100")


def test_a_checkpoint_of_which_a_killed_run_said_nothing_counts(tmp_path: Path) -> None:
    directory = run(tmp_path, 30, event("save", 20, 40.0, path="checkpoints/step_00000020"))
    pointer = directory / "checkpoints" / "latest"
    pointer.parent.mkdir()
    pointer.write_text("step_00000030\n", "utf-8")
    os.utime(pointer, (BEGIN + 60, BEGIN + 60))
    status = read_status(directory, BEGIN + 100)
    assert (status.checkpoint, status.checkpoint_step, status.checkpoint_time) == ("step_00000030", 30, BEGIN + 60)
    for spoilt in ("", "nonsense", "step_"):
        pointer.write_text(spoilt, "utf-8")
        assert read_status(directory, BEGIN + 100).checkpoint_step == 20


def test_a_run_before_its_first_step(tmp_path: Path) -> None:
    status = read_status(run(tmp_path, 0), BEGIN + 5)
    assert status.state == "running" and status.step == 0 and math.isnan(status.loss) and math.isnan(status.remaining_seconds)


def test_long_metrics_are_read_from_their_end(tmp_path: Path) -> None:
    directory = run(tmp_path, 600, filler="x" * 1000)
    assert (directory / "metrics.jsonl").stat().st_size > 2 << 18
    with open(directory / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "train", "st')
    status = read_status(directory, BEGIN + 1201)
    assert status.step == 600 and status.state == "running"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no such file; a run writes its records there"),
        ({"metrics.jsonl": ""}, "metrics.jsonl:1: the first record must be of kind 'start'"),
        ({"metrics.jsonl": "{\n"}, "metrics.jsonl"),
        ({"metrics.jsonl": "[]\n"}, "metrics.jsonl"),
        ({"metrics.jsonl": "\x00\n" * 9}, "metrics.jsonl"),
        ({"metrics.jsonl": json.dumps(start()) + "\n", "events.jsonl": "{}\n"}, "events.jsonl:1: not a record"),
    ],
)
def test_what_is_no_run_is_refused_with_the_file(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as caught:
        read_status(tmp_path, BEGIN)
    assert str(caught.value).startswith(str(tmp_path)) and message in str(caught.value)
    with pytest.raises(DataError, match="no such run directory"):
        read_status(tmp_path / "absent", BEGIN)


def test_a_process_of_this_machine_is_asked_whether_it_lives(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mine = {"host": socket.gethostname(), "boot": boot(), "pid": process.pid, "process_start": process_start(process.pid)}
    directory = run(tmp_path, 30, event("restart", 0, 1, total_steps=100, **mine))
    status = read_status(directory, BEGIN + 65)
    assert (status.state, status.why) == ("running", f"process {process.pid} on this host lives")
    status = read_status(directory, BEGIN + 1000)
    assert status.state == "stale" and status.why.endswith(f"though process {process.pid} on this host lives")
    process.send_signal(signal.SIGKILL)
    while process_start(process.pid) is not None:
        pass
    for _ in ("not yet waited for", "gone"):
        status = read_status(directory, BEGIN + 65)
        assert (status.state, status.why) == ("failed", f"process {process.pid} on this host is gone without having said why")
        process.wait()
