"""What came of a soak: the comparison with the undisturbed run, and soak.md."""

import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.atomic_io import atomic_open
from megatron_ext.checkpoint.choose import newest_whole
from megatron_ext.checkpoint.manifest import read_state
from megatron_ext.config import load_config
from megatron_ext.errors import MegatronExtError
from megatron_ext.train.ledger_check import LedgerReport, check_ledger
from megatron_ext.train.metrics import METRICS_FILE
from megatron_ext.train.sources import CONFIG_FILE

COMPARED = ("loss", "grad_norm", "tokens", "tokens_by_source")


@dataclass(frozen=True)
class Outcome:
    """What came of one fault."""

    kind: str
    what: str
    step: int
    """The last step before it."""
    seconds: float
    """Until the run trained again."""
    recovered: bool
    loadable: bool
    """A whole checkpoint was there right after it."""
    restarts: int
    lost: int
    """Steps that had to be trained again."""
    met: bool = True
    """The run met the fault; a full disk is not met by a run that does not save meanwhile."""

    @property
    def label(self) -> str:
        """The row of the table that it counts in."""
        return self.kind if self.met else f"{self.kind}, not met: no save failed"

    def __str__(self) -> str:
        end = f"trains again after {self.seconds:.1f} s" if self.recovered else "DOES NOT RECOVER"
        checkpoint = "" if self.loadable else ", NO WHOLE CHECKPOINT"
        return f"{self.what} after step {self.step}: {end}, {self.lost} steps again{checkpoint}"


@dataclass(frozen=True)
class Comparison:
    """The run against the undisturbed one."""

    steps: int
    different: list[str]
    """Steps and fields, or files of the last checkpoint, that differ; the first few."""
    files: int
    """Files of the last checkpoint that are equal."""


@dataclass(frozen=True)
class Report:
    """All that soak.md tells."""

    seed: int
    hurt_seconds: float
    seconds: float
    load: list[float]
    obstacle: str | None
    outcomes: list[Outcome]
    comparison: Comparison
    ledger: LedgerReport
    events: list[dict[str, Any]]
    launcher: bool

    @property
    def passed(self) -> bool:
        """Everything recovered, a whole checkpoint was always there, nothing differs, and the whole ledger adds up."""
        good = all(each.recovered and each.loadable for each in self.outcomes) and bool(self.outcomes)
        equal = not self.comparison.different and self.comparison.steps > 0
        return good and equal and not self.ledger.problems and not self.ledger.unchecked


def compare(run: Path, undisturbed: Path, steps: int) -> Comparison:
    """Every step's losses, gradient norms and tokens, and the hashes of the files of the last checkpoint, bit for bit."""
    (seen, twice), (expected, _) = _steps(run), _steps(undisturbed)
    different = [f"step {step} stands twice" for step in twice]
    different += [f"step {step} is missing" for step in range(1, steps + 1) if step not in seen or step not in expected]
    different += [
        f"step {step}: {field} {seen[step][field]!r}, undisturbed {expected[step][field]!r}"
        for step in sorted(seen.keys() & expected.keys())
        for field in COMPARED
        if seen[step][field] != expected[step][field]
    ]
    files, others = (_files(each) for each in (run, undisturbed))
    different += [f"{name} of the last checkpoint" for name in sorted(files.keys() | others.keys()) if files.get(name) != others.get(name)]
    return Comparison(len(seen), different[:10], len(files))


def ledger_of(run: Path) -> LedgerReport:
    """The check of the ledger of a run; one that cannot be read is a problem too."""
    try:
        return check_ledger(run, load_config(run / CONFIG_FILE, []))
    except MegatronExtError as error:
        return LedgerReport(problems=[str(error)])


def _steps(run: Path) -> tuple[dict[int, dict[str, Any]], list[int]]:
    """Train records by step, and steps that have more than one."""
    records: dict[int, dict[str, Any]] = {}
    twice = []
    for line in (run / METRICS_FILE).read_text("utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "train":
            twice += [record["step"]] if record["step"] in records else []
            records[record["step"]] = record
    return records, twice


def _files(run: Path) -> dict[str, Any]:
    newest = newest_whole(run / "checkpoints").path
    assert newest is not None, "the run has ended in good order"
    return {**read_state(newest)["files"], "step": newest.name}


def write_report(path: Path, report: Report) -> None:
    """soak.md, atomically."""
    with atomic_open(path) as file:
        file.write("\n".join(_lines(report)) + "\n")


def _lines(report: Report) -> list[str]:
    outcomes, comparison = report.outcomes, report.comparison
    load, cores = report.load, os.cpu_count()
    starts = "the deepspeed launcher" if report.launcher else "forks of one process (`--fork`)"
    restarts = sum(each.restarts for each in outcomes)
    seen = [event for event in report.events if event["event"] in ("start", "restart")]
    extra = len(seen) - 1 - restarts
    lines = [
        "# Soak",
        "",
        f"`tools/soak.py --seed {report.seed}`: 4 gloo ranks (dp 2 x tp 2) under `tools/supervise.py`, ranks started as {starts}, hurt for "
        f"{report.hurt_seconds / 60:.1f} minutes; {report.seconds / 60:.1f} minutes with the undisturbed run. {cores} cores, load average "
        f"{min(load):.1f} to {max(load):.1f} (median {statistics.median(load):.1f}).",
        "",
        f"**{'Passed' if report.passed else 'FAILED'}.** {len(outcomes)} faults, {restarts} starts after them, {extra} starts besides; "
        f"{sum(each.lost for each in outcomes)} steps trained again; {sum(each.loadable for each in outcomes)} of {len(outcomes)} times a "
        f"whole checkpoint right after the fault; {sum(event['event'] == 'passed_over' for event in report.events)} damaged checkpoints "
        f"passed over. {comparison.steps} steps: losses, gradient norms and tokens of every step and {comparison.files} entries of the "
        f"last checkpoint {'DIFFER from' if comparison.different else 'are equal, bit for bit, to'} those of the undisturbed run.",
        "",
    ]
    rows = ", ".join(f"{report.ledger.rows[kind]} {kind}" for kind in sorted(report.ledger.rows.keys() - {"begin"}))
    verdict = "DOES NOT ADD UP" if report.ledger.problems else "adds up"
    lines += [f"The ledger ({rows or 'no'} steps) {verdict}. Checked: {'; '.join(report.ledger.checked) or 'nothing'}.", ""]
    lines += [f"- ledger: {each}" for each in report.ledger.problems]
    lines += [f"- ledger, not checked: {each}" for each in report.ledger.unchecked]
    if report.obstacle:
        lines += [f"No disk was filled: {report.obstacle}.", ""]
    lines += [f"- {each}" for each in comparison.different]
    lines += ["| fault | times | seconds until a step is trained: median | max | steps again: median | max |", "|---|---|---|---|---|---|"]
    for kind in sorted({each.label for each in outcomes}):
        of_kind = [each for each in outcomes if each.label == kind]
        seconds, lost = [each.seconds for each in of_kind], [each.lost for each in of_kind]
        lines.append(
            f"| {kind} | {len(of_kind)} | {statistics.median(seconds):.1f} | {max(seconds):.1f} "
            f"| {statistics.median(lost):.0f} | {max(lost)} |"
        )
    seconds = [each.seconds for each in outcomes]
    if seconds:
        lines.append(f"| all | {len(seconds)} | {statistics.median(seconds):.1f} | {max(seconds):.1f} | | |")
    return [*lines, "", "## Faults", "", *(f"{number}. {each}" for number, each in enumerate(outcomes, 1))]
