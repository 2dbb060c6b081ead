"""Losses by position and needles, read from metrics.jsonl and drawn where they belong."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.errors import DataError
from megatron_ext.report.context_figures import all_figures
from megatron_ext.report.metrics import read_run
from megatron_ext.report.page import render
from megatron_ext.report.phase_axes import Figure
from megatron_ext.report.summary import Phase, arrange
from tests.report.fake_runs import TOKENS_PER_STEP, evaluation, start, train, write_run
from tests.report.svg import paths, texts


def by_position(*losses: float) -> list[dict[str, Any]]:
    edges = [0, 1024, 4096, None]
    bounds = zip(edges, edges[1:], losses, strict=False)
    return [{"start": begin, "stop": stop, "loss": loss, "tokens": 7} for begin, stop, loss in bounds]


def needle(step: int, exact: list[list[float]], **changes: Any) -> dict[str, Any]:
    likely = [[-2.0 * (1 - share) for share in row] for row in exact]
    record = {"kind": "needle", "time": 1.7e9 + 2 * step, "step": step, "tokens": step * TOKENS_PER_STEP, "lengths": [1024, 3000]}
    return record | {"depths": [0.0, 0.5, 1.0], "samples": 4, "exact": exact, "log_probability": likely} | changes


def phases_of(directory: Path, *records: Any) -> list[Phase]:
    return arrange([read_run(write_run(directory / "run", [start(), train(1), train(2), *records]))])


def named(phases: list[Phase]) -> dict[str, Figure]:
    return {figure.title: figure for figure in all_figures(phases)}


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    exact = [[0.25, 0.0, 1.0], [0.5, 0.5, 0.75]]
    [phase] = phases_of(tmp_path, evaluation(2, "prose", 4.0, by_position=by_position(5.0, 4.0, 3.0)), needle(2, exact))
    [evaluated], [asked] = phase.run.evals, phase.run.needles
    assert [bucket["loss"] for bucket in evaluated.by_position] == [5.0, 4.0, 3.0] and math.isnan(evaluated.by_position[2]["stop"])
    assert (asked.exact, asked.lengths, asked.depths, asked.samples) == (exact, [1024, 3000], [0.0, 0.5, 1.0], 4)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (needle(1, [[0.0] * 3]), "exact has not a row for each of 2 lengths with 3 depths"),
        (needle(1, [[0.0] * 3, [0.0] * 2]), "exact has not a row for each of 2 lengths"),
        (evaluation(1, "a", 4.0, by_position=[{"start": 0}]), "expected start, stop, loss and tokens of each bucket"),
    ],
)
def test_a_wrong_record_is_refused_with_its_line(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=re.escape(reason)) as caught:
        phases_of(tmp_path, json.dumps(record))
    assert "metrics.jsonl:4" in str(caught.value)


def test_after_a_resume_later_needles_do_not_count(tmp_path: Path) -> None:
    zeros = [[0.0] * 3] * 2
    records = [start(), needle(2, zeros), needle(6, zeros), start(step=3), needle(4, [[1.0] * 3] * 2)]
    run = read_run(write_run(tmp_path / "run", records))
    assert [(record.step, record.exact[0][0]) for record in run.needles] == [(2, 0.0), (4, 1.0)]


def test_losses_by_position_end_at_their_last_bucket(tmp_path: Path) -> None:
    first = evaluation(0, "prose", 6.0, by_position=by_position(6.0, 6.5, 7.0))
    last = evaluation(2, "prose", 4.0, by_position=by_position(5.0, 4.0, 3.0))
    short = [evaluation(step, "code", 4.0, by_position=by_position(4.5)) for step in (0, 2)]
    figure = named(phases_of(tmp_path, first, short[0], last, short[1]))["Loss by position in pretrain"]
    assert {"prose 3.00", "code 4.50", "0", "1k", "4k"} <= set(texts(figure.svg))
    curves = [path for path in paths(figure.svg, "var(--series-0); stroke-width: 2") if len(path) == 3]
    dashed = [path for path in paths(figure.svg, "stroke-dasharray") if len(path) == 3]
    assert len(curves) == 1 and (np.diff(curves[0][:, 1]) > 0).all(), "falls, and higher on a page is a smaller y"
    assert len(dashed) == 1 and (np.diff(dashed[0][:, 1]) < 0).all()


def test_one_bucket_makes_no_picture(tmp_path: Path) -> None:
    assert all_figures(phases_of(tmp_path / "a", evaluation(2, "prose", 4.0, by_position=by_position(4.0)))) == []
    plain = phases_of(tmp_path / "b", evaluation(2, "prose", 4.0))
    assert all_figures(plain) == [] and "What context is worth" not in render(plain)


def test_cells_of_a_map_stand_at_their_length_and_depth(tmp_path: Path) -> None:
    figures = named(phases_of(tmp_path, needle(1, [[0.0] * 3] * 2), needle(2, [[0.0, 0.25, 0.0], [0.0, 0.0, 1.0]])))
    assert list(figures) == ["Needles found", "Likelihood of needles", "Needles found over training"]
    svg = figures["Needles found"].svg
    found = re.findall(r'<path d="([^"]*)"[^>]*style="fill: var\(--series-0\)(?:; opacity: ([\d.]+))?', svg)
    cells = [
        (float(opacity or 1), np.array(re.findall(r"-?\d+(?:\.\d+)?", path), dtype=np.float64).reshape(-1, 2)) for path, opacity in found
    ]
    assert len(cells) == 6
    [(_, full)] = [cell for cell in cells if cell[0] == 1]
    corners = np.concatenate([points for _, points in cells])
    assert full.max(0)[0] == corners.max(0)[0] and full.min(0)[1] == corners.min(0)[1], "the deepest at the right, the longest at the top"
    assert texts(svg).count("0%") == 4 + 1 and {"25%", "100%", "1k", "3,000"} <= set(texts(svg))
    assert {"\u22122.00", "\u22121.50", "0.00"} <= {
        text.replace("\u22120.00", "0.00") for text in texts(figures["Likelihood of needles"].svg)
    }
    assert {"1k 8%", "3,000 33%"} <= set(texts(figures["Needles found over training"].svg))


@pytest.mark.filterwarnings("error")
def test_the_page_shows_values_that_are_not_finite(tmp_path: Path) -> None:
    broken = needle(2, [[0.0] * 3] * 2, log_probability=[[None, math.nan, -math.inf], [math.inf, -1.0, 0.0]])
    text = render(phases_of(tmp_path, broken, evaluation(2, "prose", 4.0, by_position=by_position(math.nan, math.inf, 3.0))))
    assert "What context is worth" in text and "n/a" in text and "#fe01" not in text
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
