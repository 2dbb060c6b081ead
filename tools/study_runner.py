"""Runs of a study, each in a process of its own, as a user starts it."""

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from megatron_ext.config import total_steps
from megatron_ext.config.study import Study, StudyRun
from megatron_ext.report import formats
from megatron_ext.report.events import latest_events
from megatron_ext.report.lines import last_objects
from megatron_ext.report.metrics import Run, read_run
from megatron_ext.report.study import validation_loss

PRETRAIN = Path(__file__).resolve().parents[1] / "examples" / "pretrain.py"
_LAST_LINES = 20
_POLL_SECONDS = 0.2


class RunStopped(Exception):
    """A run ended before its last step: says which, how, and its last lines."""


@dataclass
class Active:
    """A run that trains now."""

    run: StudyRun
    process: subprocess.Popen[bytes]
    slot: int
    """Which share of the cores it has."""
    task: TaskID


class Runner:
    """Runs what is left of a study and shows how far it is.

    Args:
        study: for the number of all runs, and the configuration file.
        parallel: most runs at a time.
        lock: descriptor that the runs inherit.
        console: where progress goes.
    """

    def __init__(self, study: Study, parallel: int, lock: int, console: Console) -> None:
        self._study, self._parallel, self._lock, self._console = study, parallel, lock, console
        sweeps = sum(len(variant.swept_values) for variant in study.variants.values())
        self._total = sweeps + len(study.variants) * (len(study.seeds) - 1)
        self._done = 0
        self._kept = 0.0
        self._begin = time.monotonic()

    def run(self, runs: Sequence[StudyRun]) -> list[Run]:
        """Run those of ``runs`` that are not finished; what all of them wrote, in their order.

        Raises:
            RunStopped: one failed, or was stopped by another. The others were stopped too and go on when they are run again.
        """
        waiting = deque(run for run in runs if not is_finished(run))
        self._done += len(runs) - len(waiting)
        self._kept += len(runs) - len(waiting)
        active: list[Active] = []
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[rest]}", markup=False))
        with Progress(*columns, console=self._console, disable=not self._console.is_terminal, transient=True) as progress:
            whole = progress.add_task("study", total=self._total, rest="")
            try:
                while waiting or active:
                    while waiting and len(active) < self._parallel:
                        active.append(self._start(waiting.popleft(), active, progress))
                    time.sleep(_POLL_SECONDS)
                    for each in [each for each in active if each.process.poll() is not None]:
                        active.remove(each)
                        progress.remove_task(each.task)
                        self._end(each)
                    self._show(progress, whole, active)
            finally:
                stop(active)
        return [read_run(run.directory) for run in runs]

    def _start(self, run: StudyRun, active: Sequence[Active], progress: Progress) -> Active:
        slot = min(set(range(self._parallel)) - {each.slot for each in active})
        run.directory.mkdir(parents=True, exist_ok=True)
        with open(log_of(run), "ab") as log:
            command = [sys.executable, str(PRETRAIN), *pretrain_command(self._study, run)]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, pass_fds=[self._lock])
        cores = sorted(os.sched_getaffinity(0))
        # Before the process has threads, which inherit it; a run takes as many threads as it may use cores.
        os.sched_setaffinity(process.pid, cores[slot % len(cores) :: self._parallel] if self._parallel > 1 else cores)
        return Active(run, process, slot, progress.add_task(str(run), total=total_steps(run.config), rest=""))

    def _end(self, ended: Active) -> None:
        if not is_finished(ended.run):
            code = ended.process.returncode
            how = f"failed with exit status {code}" if code else "was stopped before its last step"
            lines = log_of(ended.run).read_text("utf-8", errors="replace").splitlines()[-_LAST_LINES:]
            raise RunStopped(f"the run {ended.run} {how}; the end of {log_of(ended.run)}:\n" + "\n".join(f"  {line}" for line in lines))
        self._done += 1
        run = read_run(ended.run.directory)
        what = f"validation loss {formats.loss(validation_loss(run))} in {formats.duration(run.seconds)}"
        self._console.print(Text(f"[{self._done}/{self._total}] {ended.run}: {what}{self._rest(0.0)}"))

    def _show(self, progress: Progress, whole: TaskID, active: Sequence[Active]) -> None:
        if progress.disable:
            return
        shares = 0.0
        for each in active:
            total = total_steps(each.run.config)
            step, loss = last_step(each.run.directory)
            shares += step / total
            progress.update(each.task, completed=step, rest=f"step {step} of {total}" + (f", loss {loss:.3f}" if step else ""))
        progress.update(whole, completed=self._done + shares, rest=f"{self._done} of {self._total} runs{self._rest(shares)}")

    def _rest(self, shares: float) -> str:
        """In words, how long the rest takes at the pace so far; ``shares`` are the parts of runs under way that are done."""
        computed = self._done + shares - self._kept
        left = self._total - self._done - shares
        if computed <= 0 or left <= 0:
            return ""
        return f"; about {formats.duration((time.monotonic() - self._begin) / computed * left)} left"


def pretrain_command(study: Study, run: StudyRun) -> list[str]:
    """Arguments of examples/pretrain.py."""
    return ["--config", study.config, *run.overrides]


def is_finished(run: StudyRun) -> bool:
    """The run saved its last step, which is the last that it does."""
    last = total_steps(run.config)
    return any(event.event == "save" and event.step == last for event in latest_events(run.directory))


def last_step(run_dir: Path) -> tuple[int, float]:
    """Last step of a run that is under way, 0 before the first, and its training loss."""
    steps = [(line["step"], line["loss"]) for line in last_objects(run_dir / "metrics.jsonl") if line.get("kind") == "train"]
    return steps[-1] if steps else (0, float("nan"))


def log_of(run: StudyRun) -> Path:
    """Where the output of a run goes."""
    return run.directory / "output.log"


def stop(active: Sequence[Active]) -> None:
    """Ask runs to save at the end of their step, and wait until they have."""
    for each in active:
        each.process.terminate()
    for each in active:
        each.process.wait()
