"""The soak, short; and that it would see what it looks for."""

import json
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from megatron_ext.train.ledger_check import LedgerReport
from tests.distributed import RunRanks
from tests.tools.loading import TOOLS, load_tool
from tests.train.tiny_run import train, write_run


def test_a_short_soak_passes(tmp_path: Path) -> None:
    kinds = "kill_rank,damage,stop_rank"
    command = [sys.executable, str(TOOLS / "soak.py"), "--faults", "3", "--seed", "3", "--gap", "1", "--kinds", kinds]
    done = subprocess.run([*command, "--output", str(tmp_path / "soak")], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "soak" / "soak.md").read_text("utf-8")
    assert "**Passed.** 3 faults" in report and "3 of 3 times a whole checkpoint" in report and "are equal, bit for bit" in report
    assert "steps) adds up. Checked: steps follow each other" in report and "every document once an epoch" in report
    assert all(f"| {kind} | 1 |" in report for kind in kinds.split(","))


def test_faults_follow_from_the_seed_and_every_kind_comes() -> None:
    faults = load_tool("soak_faults")
    first, again, other = (list(islice(faults.schedule(seed, faults.KINDS, 4.0), 60)) for seed in (1, 1, 2))
    assert first == again != other
    assert all({fault.kind for fault in first[start : start + 6]} == set(faults.KINDS) for start in range(0, 60, 6))
    assert {fault.rank for fault in first} == {0, 1, 2, 3} and {fault.during_save for fault in first} == {True, False}


def test_the_comparison_sees_a_loss_a_step_and_a_file_that_differ(run_ranks: RunRanks, tmp_path: Path) -> None:
    report = load_tool("soak_report")
    run_ranks(1, train, write_run(tmp_path, train__steps=3, checkpoint__every=1))
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(run, other)
    assert report.compare(run, other, 3).different == [] and report.compare(run, other, 4).different == ["step 4 is missing"]

    lines = (other / "metrics.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    second = next(record for record in records if record["kind"] == "train" and record["step"] == 2)
    second["loss"] += 1e-7
    (other / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    assert [text.split(":")[0] for text in report.compare(run, other, 3).different] == ["step 2"]
    twice = next(line for line in lines if '"kind": "train"' in line)
    (other / "metrics.jsonl").write_text("".join(f"{line}\n" for line in [*lines, twice]), "utf-8")
    assert report.compare(other, run, 3).different == ["step 1 stands twice"]

    shutil.rmtree(other / "checkpoints" / "step_00000003")
    (other / "checkpoints" / "latest").write_text("step_00000002\n")
    assert any("of the last checkpoint" in text for text in report.compare(run, other, 3).different)


def report_of(tmp_path: Path, ledger: LedgerReport, met: bool = True) -> tuple[bool, str]:
    """Whether a soak of one full disk passed, and its report."""
    module = load_tool("soak_report")
    outcome = module.Outcome("disk_full", "disk full", 3, 1.0, recovered=True, loadable=True, restarts=0, lost=0, met=met)
    compared = module.Comparison(5, [], 8)
    report = module.Report(1, 60.0, 90.0, [1.0], None, [outcome], compared, ledger, [{"event": "start"}], launcher=False)
    module.write_report(tmp_path / "soak.md", report)
    return report.passed, (tmp_path / "soak.md").read_text("utf-8")


def test_a_ledger_that_does_not_add_up_or_was_not_checked_fails_the_soak(tmp_path: Path) -> None:
    assert report_of(tmp_path, LedgerReport(checked=["steps"]))[0]
    passed, text = report_of(tmp_path, LedgerReport(checked=["steps"], problems=["document 3 twice"]))
    assert not passed and "**FAILED.**" in text and "DOES NOT ADD UP" in text and "- ledger: document 3 twice" in text
    passed, text = report_of(tmp_path, LedgerReport(unchecked=["documents: begun later"]))
    assert not passed and "- ledger, not checked: documents: begun later" in text
    (tmp_path / "config.yaml").write_text("{}", "utf-8")
    assert load_tool("soak_report").ledger_of(tmp_path).problems


def test_a_full_disk_that_no_save_met_is_told_apart(tmp_path: Path) -> None:
    assert "| disk_full | 1 |" in report_of(tmp_path, LedgerReport())[1]
    assert "| disk_full, not met: no save failed | 1 |" in report_of(tmp_path, LedgerReport(), met=False)[1]


@pytest.mark.parametrize("arguments", [["--kinds", "lightning"], ["--output", "."]])
def test_what_cannot_be_is_refused(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(TOOLS / "soak.py"), "--faults", "1", "--output", str(tmp_path / "new"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and f"error: {arguments[0]}: {arguments[1]}" in done.stderr
