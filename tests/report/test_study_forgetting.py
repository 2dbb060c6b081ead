"""The table of learned and forgotten sources in a study."""

from collections.abc import Sequence
from pathlib import Path

from megatron_ext.report.metrics import read_run
from megatron_ext.report.study import Variant
from megatron_ext.report.study_forgetting import forgetting_table, gaps
from megatron_ext.report.study_page import render_study
from tests.report.fake_runs import evaluation, start, train, write_run
from tests.report.test_page import Page

CONTINUED = {"run": "continued", "model": {"init_from": "somewhere"}}


def variant(directory: Path, name: str, curves: Sequence[tuple[Sequence[float], Sequence[float]]], config: object = CONTINUED) -> Variant:
    """A run a seed, with losses of prose and of code at steps 0, 1 and 2."""
    runs = {}
    for seed, (prose, code) in enumerate(curves):
        evals = [evaluation(step, name, losses[step]) for step in range(3) for name, losses in (("prose", prose), ("code", code))]
        records = [start(), *evals[:2], train(1), *evals[2:4], train(2), *evals[4:]]
        runs[seed] = read_run(write_run(directory / name / str(seed), records, config=config))
    return Variant(name, None, {}, runs)


def test_each_source_has_its_last_loss_and_its_worst_rise(tmp_path: Path) -> None:
    plain = variant(tmp_path, "plain", [((4.0, 5.0, 4.5), (6.0, 3.0, 2.0)), ((4.0, 4.5, 4.25), (6.0, 3.0, 2.5))])
    kind = variant(tmp_path, "kind", [((4.0, 4.0, 3.9), (6.0, 6.25, 3.0)), ((4.0, 4.0, 3.9), (6.0, 6.25, 3.0))])
    table = forgetting_table([plain, kind])
    assert table is not None and table.columns == ["prose", "prose: worst rise", "code", "code: worst rise"]
    assert table.rows[0] == [("4.375", "4.250 to 4.500"), ("0.750", "0.500 to 1.000"), ("2.250", "2.000 to 2.500"), ("0.000", "")]
    assert table.rows[1] == [("3.900", ""), ("0.000", ""), ("3.000", ""), ("0.250", "")]
    page = Page(render_study("Continued", [plain, kind]))
    assert "Learned and forgotten" in page.text and page.tables[1][2][0] == "kind"
    assert gaps(plain.runs[0])["prose"].worst_tokens == plain.runs[0].train[0].tokens


def test_runs_from_nothing_forget_nothing(tmp_path: Path) -> None:
    fresh = variant(tmp_path, "fresh", [((4.0, 5.0, 4.5), (6.0, 3.0, 2.0))], config={"run": "fresh", "model": {"init_from": None}})
    continued = variant(tmp_path, "continued", [((4.0, 5.0, 4.5), (6.0, 3.0, 2.0))])
    assert forgetting_table([fresh]) is None and forgetting_table([continued, fresh]) is None
    assert "Learned and forgotten" not in Page(render_study("Fresh", [fresh])).text
