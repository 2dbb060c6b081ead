"""Skipped steps and returns in figures and on the page."""

import json
import re
from pathlib import Path
from typing import Any

from megatron_ext.report import figures
from megatron_ext.report.bad_steps import rollbacks
from megatron_ext.report.metrics import read_run
from megatron_ext.report.page import render
from megatron_ext.report.summary import arrange
from tests.report.fake_runs import start, train, write_run


def event(name: str, step: int, **fields: Any) -> dict[str, Any]:
    return {"kind": "event", "event": name, "time": 1.7e9, "step": step, **fields}


def run_with(folder: Path, *events: dict[str, Any]) -> Path:
    directory = write_run(folder, [start(), *(train(step, skipped_steps=int(step > 6)) for step in range(1, 9))])
    (directory / "events.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in events), "utf-8")
    return directory


SKIP = {"reasons": ["loss_spike", "grad_norm_spike"], "loss": 9.75, "grad_norm": 41.5}
BACK = {"number": 0, "first_step": 4, "last_step": 6, "causes": [{"step": 5}, {"step": 6}]}


def test_the_page_tells_what_stands(tmp_path: Path) -> None:
    events = [event("skip", 5, **SKIP), event("skip", 6, **SKIP), event("rollback", 3, **BACK), event("rollback", 3, **BACK)]
    run = read_run(run_with(tmp_path / "run", *events, event("skip", 7, **SKIP)))
    assert run.skipped == [7] and [each.step for each in rollbacks(run)] == [3], "steps 5 and 6 were computed again; one return, told twice"
    page = render(arrange([run]))
    rows = re.findall(r"<tr><td>pretrain</td><td class=\"number\">(\d)</td><td>(.*?)</td><td>(.*?)</td>", page)
    assert rows == [("3", "went back from step 6", "skipped: 5, 6"), ("7", "skipped", "loss spike, grad norm spike")]
    assert "41.5" in page and "9.75" in page


def test_both_curves_carry_the_marks(tmp_path: Path) -> None:
    run = read_run(run_with(tmp_path / "run", event("rollback", 3, **BACK), event("skip", 7, **SKIP)))
    for figure in (figures.gradient_norm(arrange([run])), figures.training_loss(arrange([run]))):
        assert figure is not None and "Triangles: skipped steps (1). Arrows to the left" in figure.caption
        marks = [float(x) for color in (1, 2) for x in re.findall(rf'<use [^>]*x="([\d.]+)"[^>]*fill: var\(--series-{color}\)', figure.svg)]
        assert len(marks) == 2 and marks[0] > marks[1], "step 7 lies to the right of step 3"


def test_a_run_without_them_says_nothing(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", [start(), train(1), train(2)]))
    assert "Steps that were skipped" not in render(arrange([run]))
    assert figures.training_loss(arrange([run])).caption == "Nats per token, on the documents of each step."


def test_events_with_odd_values_do_not_break_the_page(tmp_path: Path) -> None:
    odd = [event("skip", 2, reasons="x", loss=None, grad_norm="nan"), event("rollback", 1, causes=3), event("skip", 7, loss=float("nan"))]
    assert "Steps that were skipped" in render(arrange([read_run(run_with(tmp_path / "run", *odd))]))
