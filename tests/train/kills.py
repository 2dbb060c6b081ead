"""Runs whose ranks are forks of this process, and die by SIGKILL at a chosen moment, all of them at once."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401 - a run imports it late, for seconds: every fork would do so again
import torch.distributed as dist

from megatron_ext.checkpoint import tensor_file
from megatron_ext.config import load_config
from megatron_ext.parallel.world import World
from megatron_ext.train.engine import Engine
from megatron_ext.train.metrics import MetricsWriter
from megatron_ext.train.run import pretrain

PATIENCE_SECONDS = 600


@dataclass(frozen=True)
class Moment:
    """When to die."""

    rank: int
    """Whose calls count."""
    call: int | None = None
    """Before this call of what changes the disk, takes a step or talks to all ranks; None: by the clock."""
    seconds: float = 0.0
    """Since the first step of this start."""


def live(config: Path, ranks: int, folder: Path, moment: Moment | None) -> str | None:
    """Start the run on ``ranks`` forks; returns what it was doing when it was killed, None if it came to its end before.

    Raises:
        AssertionError: it ended in any other way, with what it printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log, (read, write) = folder / "log", os.pipe()
    (folder / "store").unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    pids: list[int] = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.close(read)
            _be(rank, ranks, config, folder, pids[0] if pids else 0, moment, write)
        pids.append(pid)
        os.setpgid(pid, pids[0])
    os.close(write)
    try:
        statuses = [_wait(pid) for pid in pids]
    finally:
        _kill_group(pids[0])
    with os.fdopen(read) as notes:
        doing = notes.read()
    if all(os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL for status in statuses):
        return doing or "the kernel or a person killed it"
    assert not any(statuses), log.read_text("utf-8", errors="replace")
    return None


def _wait(pid: int) -> int:
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.005)
    raise AssertionError("the run hangs")


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def _be(rank: int, ranks: int, config: Path, folder: Path, leader: int, moment: Moment | None, notes: int) -> None:
    """A rank, to its end. Not one more line of the test runner may run here."""
    try:
        os.setpgid(0, leader)
        output = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        # Those of the test runner write into its own files; open as long as the rank.
        sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1, encoding="utf-8")
        ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
        os.environ.update({name: str(value) for name, value in ours.items()})
        store = dist.FileStore(str(folder / "store"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
        if moment is not None and moment.rank == rank:
            _arm(moment, notes)
        pretrain(load_config(config, []))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _arm(moment: Moment, notes: int) -> None:
    calls, due = [0], [float("inf")]

    def die(name: str) -> None:
        os.write(notes, f"{_part()}: {name}".encode())
        os.killpg(0, signal.SIGKILL)

    def deadly(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            calls[0] += 1
            if calls[0] == moment.call:
                die(name)
            if name == "step" and moment.call is None and due[0] == float("inf"):
                due[0] = time.monotonic() + moment.seconds
                signal.setitimer(signal.ITIMER_REAL, moment.seconds)
            return function(*arguments, **keywords)

        return wrapper

    signal.signal(signal.SIGALRM, lambda number, frame: die("clock"))
    places = [(os, name) for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "link")]
    places += [(World, "sum"), (World, "gather"), (Engine, "step"), (MetricsWriter, "write"), (tensor_file, "memoryview")]
    for owner, name in places:
        setattr(owner, name, deadly(name, getattr(owner, name, memoryview)))


def _part() -> str:
    """Where the calls of all threads of this process stand: in a save or not."""
    files = []
    for frame in sys._current_frames().values():
        while frame is not None:
            files.append(frame.f_code.co_filename)
            frame = frame.f_back
    if any("/checkpoint/save.py" in file or "/checkpoint/background.py" in file for file in files):
        return "saving"
    return "training" if any(file.endswith("/train/engine.py") for file in files) else "starting or between steps"
