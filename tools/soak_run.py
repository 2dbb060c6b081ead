"""The run that ``tools/soak.py`` hurts: its configuration, its supervisor, its ranks."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from soak_faults import Fault

from megatron_ext.checkpoint.choose import newest_whole
from megatron_ext.checkpoint.directory import saved_steps
from megatron_ext.data.indexed_writer import IndexedDatasetWriter
from megatron_ext.train.metrics import METRICS_FILE
from megatron_ext.train.supervisor_log import LOG_FILE, last_step

TOOLS = Path(__file__).resolve().parent
RANKS, VOCAB = 4, 64
RECOVERY_SECONDS = 300.0
DISK_MEBIBYTES = 8
NO_SPACE = "No space left on device"
LONG = 1_000_000
"""More steps than a soak can train; the learning rate is constant, so that the length of the run changes nothing."""


def write_config(folder: Path, grid: Mapping[str, int]) -> Path:
    """A corpus of random documents, and the configuration of a small model on it."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "corpus", np.dtype("uint16")) as writer:
        for length in draw.integers(1, 60, size=400):
            writer.add(np.minimum(draw.geometric(0.1, size=length), VOCAB - 1).astype(np.uint16))
    values: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "seed": 7,
        "model": {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2},
        "data": {
            "sources": [{"name": "random", "path": str(folder / "corpus")}],
            "sequence_length": 32,
            "tokens_per_step": 256,
        },
        "parallel": dict(grid),
        "optimizer": {"lr": 0.003},
        "schedule": {"kind": "constant", "warmup_steps": 2},
        "train": {"steps": LONG, "dtype": "float32", "threads_per_rank": 1, "heartbeat_timeout": 10.0},
        "evaluation": {"tokens": 256},
        "logging": {"every": 20, "tensorboard": False, "ledger": True},
        "checkpoint": {"every": 4, "keep_last": 4, "asynchronous": True},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    return path


@contextmanager
def small_disk(folder: Path) -> Iterator[str | None]:
    """A small tmpfs at ``folder``; yields why there is none, or None."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MEBIBYTES}m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False) if os.geteuid() == 0 else None
    try:
        yield "mounting a tmpfs needs root" if done is None else done.stderr.strip() or None
    finally:
        if done is not None and done.returncode == 0:
            subprocess.run(["umount", "--lazy", str(folder)], check=False)


class NoRecovery(RuntimeError):
    """The run did not come back."""


class SoakRun:
    """A run under its supervisor, which is started again when it ends."""

    def __init__(self, config: Path, run_dir: Path, *, launcher: bool, log: Path, steps: int = LONG) -> None:
        self.run_dir, self.checkpoints = run_dir, run_dir / "checkpoints"
        start = ["--local", str(RANKS)] if launcher else ["--local", str(RANKS), "--fork"]
        limits = ["--max-restarts", "1000000", "--max-stuck", "20", "--grace", "5", "--pause", "0"]
        what = ["--config", str(config), f"run_dir={run_dir}", f"train.steps={steps}"]
        self._command = [sys.executable, str(TOOLS / "supervise.py"), *start, *limits, *what]
        self._log = open(log, "ab")  # noqa: SIM115 - open as long as the soak
        self._log_path = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the supervisor."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self._process = subprocess.Popen(
            self._command, stdout=self._log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )

    def terminate(self) -> None:
        """SIGTERM to the supervisor."""
        assert self._process is not None, "it was started"
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """kill -9 of the supervisor and everything it started."""
        if self._process is None or self._process.poll() is not None:
            return
        supervisor = psutil.Process(self._process.pid)
        for each in [supervisor, *supervisor.children(recursive=True)]:
            try:
                each.kill()
            except psutil.NoSuchProcess:
                continue
        self._process.wait()

    def stop(self) -> None:
        """End in good order. Raises NoRecovery if it does not."""
        self.terminate()
        self.wait_for_end()

    def wait_for_end(self) -> None:
        """Start it if need be, and wait for its good end. Raises NoRecovery if it is another."""
        if self._process is None:
            self.start()
        assert self._process is not None, "it was started"
        if code := self._process.wait():
            raise NoRecovery(f"the supervisor ended with {code}; {self._log_path} says why")

    def ranks(self) -> dict[int, int]:
        """Process of each rank, once all are there."""
        found: dict[int, int] = {}

        def complete() -> bool:
            found.clear()
            for child in psutil.Process(self._pid).children(recursive=True):
                if (rank := _rank_of(child)) is not None:
                    found[rank] = child.pid
            return len(found) == RANKS

        self._until(complete, "not all ranks are there")
        return found

    def step(self) -> int:
        """The last step that was trained."""
        return last_step(self.run_dir / METRICS_FILE)

    def events(self) -> list[dict[str, Any]]:
        """What the supervisors did."""
        path = self.run_dir / LOG_FILE
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []

    def newest_whole(self) -> Path | None:
        """The checkpoint that a restart would go on from now. Tried again where one is being replaced."""
        for _ in range(5):
            if path := newest_whole(self.checkpoints).path:
                return path
            time.sleep(0.2)
        return None

    def said_disk_full(self) -> int:
        """How often the run complained of a full disk."""
        return self._log_path.read_text("utf-8", errors="replace").count(NO_SPACE)

    def wait_for_moment(self, fault: Fault) -> None:
        """The fault's moment: some seconds from now, or in the first save after them. Two checkpoints are there, one to be damaged."""
        end = time.monotonic() + fault.gap
        self._until(lambda: time.monotonic() >= end and len(saved_steps(self.checkpoints)) > 1, "nothing is saved")
        if fault.during_save:
            self._until(lambda: any(self.checkpoints.glob(".step_*")), "no save is under way", pause=0.002)

    def recover(self, fault: Fault, begin: float) -> None:
        """Until the run trains again, or, where it need not have ended, saves again. A supervisor that ended in good order is started."""
        if fault.kind == "disk_full":
            emptied = time.time()
            self._until(lambda: self._saved_after(emptied), "nothing is saved after the disk was emptied")
            return
        if fault.kind == "sigterm":
            self.wait_for_end()
        if fault.kind in ("sigterm", "kill_all"):
            self.start()
        self._until(lambda: self._started_after(begin) is not None, "the run is not started again")
        started = self._started_after(begin)
        assert started is not None, "it was waited for"
        self.wait_until_trains(after=started)

    def wait_until_trains(self, after: float) -> None:
        """Until a step was trained after a time."""
        self._until(lambda: self._last_step_time() > after, "no step is trained")

    @property
    def _pid(self) -> int:
        assert self._process is not None, "it was started"
        return self._process.pid

    def _started_after(self, begin: float) -> float | None:
        times = [event["time"] for event in self.events() if event["event"] in ("start", "restart")]
        return next((moment for moment in times if moment > begin), None)

    def _saved_after(self, moment: float) -> bool:
        latest = self.checkpoints / "latest"
        return latest.exists() and latest.stat().st_mtime > moment and self.newest_whole() is not None

    def _last_step_time(self) -> float:
        path = self.run_dir / METRICS_FILE
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return next((json.loads(line)["time"] for line in reversed(lines) if line.startswith(b'{"kind": "train"')), 0.0)

    def _until(self, condition: Callable[[], bool], otherwise: str, pause: float = 0.05) -> None:
        end = time.monotonic() + RECOVERY_SECONDS
        while not condition():
            if time.monotonic() > end:
                raise NoRecovery(f"{otherwise} after {RECOVERY_SECONDS:.0f} s")
            if self._process is not None and self._process.poll():
                raise NoRecovery(f"{otherwise}: the supervisor ended with {self._process.returncode}; {self._log_path} says why")
            time.sleep(pause)


def _rank_of(process: psutil.Process) -> int | None:
    """The rank that a process is: a fork has its name, what a launcher started its environment."""
    try:
        if named := re.fullmatch(r"rank (\d+)", process.name()):
            return int(named[1])
        arguments = process.cmdline()
        is_rank = any(each.endswith("pretrain.py") for each in arguments[:3])
        return int(process.environ()["RANK"]) if is_rank else None
    except (psutil.NoSuchProcess, psutil.AccessDenied, KeyError):
        return None
