"""The table of losses by position in a study."""

from pathlib import Path
from typing import Any

from megatron_ext.report.metrics import read_run
from megatron_ext.report.study import Variant
from megatron_ext.report.study_page import render_study
from megatron_ext.report.study_positions import positions_table
from tests.report.fake_runs import evaluation, start, train, write_run
from tests.report.test_page import Page


def bucket(begin: int, loss: float) -> dict[str, Any]:
    return {"start": begin, "stop": begin + 256, "loss": loss, "tokens": 10}


def variant(directory: Path, name: str, *last: float) -> Variant:
    """A run a seed with two buckets of prose and one of code."""
    runs = {}
    for seed, loss in enumerate(last):
        first = evaluation(0, "prose", 6.0, by_position=[bucket(0, 6.0), bucket(256, 6.0)])
        end = [evaluation(1, "prose", loss, by_position=[bucket(0, loss), bucket(256, loss - 1)])]
        end.append(evaluation(1, "code", 3.0, by_position=[bucket(0, 3.0)]))
        runs[seed] = read_run(write_run(directory / name / str(seed), [start(), first, train(1), *end]))
    return Variant(name, None, {}, runs)


def test_the_last_losses_by_bucket(tmp_path: Path) -> None:
    variants = [variant(tmp_path, "plain", 4.0, 5.0), variant(tmp_path, "long", 3.0, 3.0)]
    table = positions_table(variants)
    assert table is not None and table.columns == ["prose from 0", "prose from 256"]  # code has no later positions
    assert table.rows == [[("4.500", "4.000 to 5.000"), ("3.500", "3.000 to 4.000")], [("3.000", ""), ("2.000", "")]]
    assert "By position in documents" in Page(render_study("Positions", variants)).text


def test_runs_with_other_buckets_have_no_table(tmp_path: Path) -> None:
    other = read_run(write_run(tmp_path / "other", [start(), train(1), evaluation(1, "prose", 4.0, by_position=[bucket(0, 4.0)])]))
    assert positions_table([variant(tmp_path, "plain", 4.0), Variant("other", None, {}, {0: other})]) is None
