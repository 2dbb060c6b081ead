"""The stability gap by hand, which domains are old, and what page and console say of it."""

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.report.forgetting import StabilityGap, described, domain, forgetting, stability_gap, worth_telling
from megatron_ext.report.metrics import read_evaluations, read_run
from megatron_ext.report.page import render
from megatron_ext.report.records import EvalRecord
from megatron_ext.report.summary import Phase, arrange
from tests.report.fake_runs import TOKENS_PER_STEP, evaluation, start, train, write_run


def curve(*losses: float) -> list[EvalRecord]:
    """Evaluations after 500, 600, 700 ... tokens."""
    return [EvalRecord(time=0.0, step=i, tokens=500 + 100 * i, source="a", loss=loss) for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((4.0, 4.5, 5.0, 4.25, 4.0, 3.5), StabilityGap(4.0, 1.0, 200, 400, -0.5)),
        ((4.0, 4.5, 3.75, 4.75, 4.25), StabilityGap(4.0, 0.75, 300, None, 0.25)),
        ((4.0, 4.5, 3.75, 4.25), StabilityGap(4.0, 0.5, 100, 200, 0.25)),
        ((4.0, 3.5, 3.0), StabilityGap(4.0, 0.0, 0, 0, -1.0)),
        ((4.0, 4.0, 4.0), StabilityGap(4.0, 0.0, 0, 0, 0.0)),
        ((4.0, 5.0), StabilityGap(4.0, 1.0, 100, None, 1.0)),
        ((4.0,), StabilityGap(4.0, 0.0, 0, 0, 0.0)),
        ((4.0, math.nan, 3.5), StabilityGap(4.0, math.inf, 100, 200, -0.5)),
    ],
)
def test_worst_rise_and_recovery(losses: tuple[float, ...], expected: StabilityGap) -> None:
    assert stability_gap(curve(*losses)) == expected


def test_old_is_what_was_trained_before_or_is_replayed() -> None:
    trained, new = ["code", "books", "prose"], ["code"]
    names = ["code", "books", "prose", "law", "poems"]
    assert [domain(name, trained, new, ["prose", "poems"]) for name in names] == ["new", "old", "old", "other", "old"]


def _phases(directory: Path, *, config: dict[str, Any] | None = None, losses: tuple[float, ...] = (4.0, 4.4, 3.9)) -> list[Phase]:
    """Pretraining on prose, then code, where prose rises and comes back."""
    before = [start(), evaluation(0, "prose", 8.0), evaluation(0, "code", 9.0), train(1), train(2)]
    before += [evaluation(2, "prose", 4.0), evaluation(2, "code", 9.5)]
    after = [start("continual")]
    for step, loss in enumerate(losses):
        after += [train(step, loss_by_source={"code": 4.0}, tokens_by_source={"code": 100 * step})] if step else []
        after += [evaluation(step, "prose", loss), evaluation(step, "code", 5.0 - step)]
    return arrange([read_run(write_run(directory / name, records, config=config)) for name, records in (("a", before), ("b", after))])


def test_rows_of_phases_and_their_domains(tmp_path: Path) -> None:
    rows = forgetting(_phases(tmp_path))
    assert [(row.phase.label, row.name, row.domain) for row in rows] == [
        ("pretrain", "prose", "new"),
        ("pretrain", "code", "other"),
        ("continual", "prose", "old"),
        ("continual", "code", "new"),
    ]
    gap = rows[2].gap
    assert (gap.worst_tokens, gap.recovery_tokens) == (TOKENS_PER_STEP, 2 * TOKENS_PER_STEP)
    assert gap.worst_rise == pytest.approx(0.4) and gap.final_difference == pytest.approx(-0.1)
    assert [row.phase.label for row in worth_telling(rows)] == ["pretrain"] * 2 + ["continual"] * 2, "code rose in pretraining"
    assert worth_telling(rows[3:]) == []
    replayed = forgetting(_phases(tmp_path / "replay", config={"data": {"sources": [{"name": "other"}]}}))
    assert replayed[3].domain == "old", "trained on, and not in data.sources"


def test_the_page_has_the_table_where_something_could_be_forgotten(tmp_path: Path) -> None:
    phases = _phases(tmp_path)
    text = render(phases)
    assert "What was forgotten on the way" in text
    for cell in ("+0.400", "recovered after 16.4 k tokens", "\u22120.100", "never above the start"):
        assert cell in text
    assert "not recovered" in render(_phases(tmp_path / "worse", losses=(4.0, 4.4, 4.1)))
    alone = [start(), evaluation(0, "prose", 8.0), train(1), evaluation(1, "prose", 4.0)]
    assert "What was forgotten" not in render(arrange([read_run(write_run(tmp_path / "c", alone))]))


def test_the_console_tells_of_a_run_that_could_forget(tmp_path: Path) -> None:
    records = [start(), *(evaluation(step, "prose", loss) for step, loss in enumerate((4.0, 4.5, 3.75))), train(1)]
    records += [evaluation(step, "code", loss) for step, loss in enumerate((5.0, 4.0, 3.0))]
    evals = read_evaluations(write_run(tmp_path / "run", records) / "metrics.jsonl")
    assert described(evals, ["prose", "code"], ["code"]) == [
        "prose (old): loss 4.000 at the start, worst +0.500 after 8.19 k tokens, recovered after 16.4 k tokens, in the end -0.250",
        "code (new): loss 5.000 at the start, never above the start, in the end -2.000",
    ]
    assert len(described(evals, ["code"], ["code"])) == 2, "prose was not trained on and rose"
    assert described(evals, ["prose", "code"], ["prose", "code"]) == []
    assert described(evals[:1], [], []) == []
