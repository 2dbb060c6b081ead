import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.report import formats
from megatron_ext.report.gantt import degree_color, plan_timeline
from megatron_ext.report.metrics import read_run
from megatron_ext.report.phase_axes import Figure
from megatron_ext.report.summary import arrange
from tests.report.fake_runs import packs_of_all_degrees, plan, start, train, write_run
from tests.report.svg import first_drawing, paths, texts

PACKS = [[0, 4, 2, 9000, 3, 0.0, 0.5], [0, 1, 1, 2345, 2, 0.5, 0.9], [1, 1, 1, 0, 0, 0.5, 0.5], [2, 2, 1, 6789, 7, 0.5, 1.25]]


def _figure(directory: Path, *records: dict[str, Any]) -> Figure | None:
    return plan_timeline(arrange([read_run(write_run(directory, [start(), train(1), *records]))]))


def _bars(svg: str, degree: int) -> np.ndarray:
    """Left, top, right and bottom of the bars of a degree, float [bars, 4], in CSS pixels."""
    found = paths(svg, f"fill: var(--{degree_color(degree)}); stroke: var(--surface)")
    corners = np.concatenate(found).reshape(-1, 4, 2)
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)


def _vertical(svg: str, style: str) -> list[float]:
    """Where the vertical lines of a style stand."""
    return [path[0, 0] for path in paths(svg, style) if len(path) == 2 and path[0, 0] == path[1, 0]]


def test_bars_and_lines_stand_at_the_predicted_seconds_and_ranks(tmp_path: Path) -> None:
    figure = _figure(tmp_path / "run", plan(1, PACKS, bound=0.875))
    svg = first_drawing(figure.svg)
    (idle,) = paths(svg, "fill: var(--grid)")
    (left, top), (right, bottom) = idle.min(axis=0), idle.max(axis=0)
    second, rank = (right - left) / 1.25, (bottom - top) / 4
    for degree in (1, 2, 4):
        packs = [pack for pack in PACKS if pack[1] == degree and pack[3]]
        wanted = [
            [left + begin * second, top + first * rank, left + end * second, top + (first + degree) * rank]
            for first, _, _, _, _, begin, end in packs
        ]
        np.testing.assert_allclose(_bars(svg, degree), wanted, atol=0.01)
    assert _vertical(svg, "stroke-dasharray") == [pytest.approx(left + 0.875 * second, abs=0.01)]
    assert pytest.approx(left + 1.25 * second, abs=0.01) in _vertical(svg, "stroke: var(--ink); stroke-width: 1.5; stroke-linecap")
    assert {"0", "1", "2", "3", "rank", "Step 1", "predicted end 1.25 s; lower bound 0.875 s (dashed)"} <= set(texts(svg))
    assert {"9 k", "2.34 k"} <= set(texts(svg)), "tokens of packs"
    assert "6.79 k" not in texts(svg), "the line of the bound would run through it"


def test_words_say_what_the_picture_shows(tmp_path: Path) -> None:
    figure = _figure(tmp_path / "run", plan(1, PACKS, bound=1.0, in_rounds=True))
    assert "Predicted by the cost model, not measured" in figure.caption
    assert "wait for each other" in figure.caption
    idle = 1 - (4 * 0.5 + 0.4 + 2 * 0.75) / (4 * 1.25)
    assert figure.caption.endswith(
        f"Step 1: 3 packs on 4 ranks, 1.25 s, 25.0 % above the lower bound, ranks idle {100 * idle:.1f} % of the time."
    )
    assert figure.svg.count(f'aria-label="{figure.title}. {figure.caption}"') == 2
    assert [text for _, text in figure.legend] == ["1 rank", "2 ranks share a pack", "4 ranks share a pack", "idle"]
    assert len({color for color, _ in figure.legend}) == 4
    assert "predicted seconds since the step began" in texts(figure.svg)


def test_without_a_bound_there_is_no_line(tmp_path: Path) -> None:
    for name, bound in (("zero", 0.0), ("null", None)):
        figure = _figure(tmp_path / name, plan(1, PACKS, bound=bound))
        assert "dasharray" not in figure.svg
        assert "bound" not in figure.caption and "bound" not in " ".join(texts(figure.svg))


def test_the_first_and_the_last_plan_are_shown(tmp_path: Path) -> None:
    plans = [plan(step, [[0, 4, 1, 1000 * step, 3, 0.0, 0.25 * step]]) for step in (1, 5, 9)]
    svg = first_drawing(_figure(tmp_path / "run", *plans).svg)
    assert [text for text in texts(svg) if text.startswith("Step")] == ["Step 1", "Step 9"]
    first, last = _bars(svg, 4)
    assert (last[2] - last[0]) / (first[2] - first[0]) == pytest.approx(9, rel=1e-3)
    assert last[1] > first[3]


def test_of_many_ranks_those_beside_the_last_to_end_are_shown(tmp_path: Path) -> None:
    packs = packs_of_all_degrees(200, seed=1)
    last = max(packs, key=lambda pack: pack[6])
    shown = range(last[0] // 64 * 64, min(last[0] // 64 * 64 + 64, 200))
    figure = _figure(tmp_path / "run", plan(1, packs, devices=200))
    svg = first_drawing(figure.svg)
    assert f"Step 1, ranks {shown.start} to {shown.stop - 1} of 200" in texts(svg)
    assert "Of more than 64 ranks, those around the one that ends last are shown." in figure.caption
    assert f"{len(packs)} packs on 200 ranks" in figure.caption
    assert len(_bars(svg, 1)) == sum(pack[0] in shown for pack in packs if pack[1] == 1)
    ticks = [int(text) for text in texts(svg) if re.fullmatch(r"\d+", text) and int(text) in shown]
    assert ticks[0] == shown.start and len(ticks) >= 8


@pytest.mark.parametrize("devices", [2, 8, 64])
def test_all_ranks_are_shown_up_to_64_and_labels_of_ranks_do_not_touch(tmp_path: Path, devices: int) -> None:
    packs = packs_of_all_degrees(devices, seed=2)
    figure = _figure(tmp_path / "run", plan(1, packs, devices=devices))
    svg = first_drawing(figure.svg)
    degrees = sorted({pack[1] for pack in packs})
    assert sum(len(_bars(svg, degree)) for degree in degrees) == len(packs)
    assert f"{len(packs)} packs on {devices} ranks, {formats.seconds(max(pack[6] for pack in packs))}" in figure.caption
    heights = [float(y) for y, text in re.findall(r'<text[^>]*y="([\d.]+)"[^>]*>(\d+)</text>', svg) if int(text) < devices]
    heights = np.unique(heights)[:-1]  # the lowest are the ticks of seconds
    assert (np.diff(heights) >= 13).all()
    assert "ranks 0 to" not in svg


def test_a_plan_without_work_is_not_drawn(tmp_path: Path) -> None:
    assert _figure(tmp_path / "none") is None
    assert _figure(tmp_path / "empty", plan(1, [])) is None
    assert _figure(tmp_path / "idle", plan(1, [[0, 1, 1, 0, 0, 0.0, 0.0]])) is None


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_seconds_of_any_size_can_be_drawn(tmp_path: Path, scale: float) -> None:
    packs = [[*pack[:5], pack[5] * scale, pack[6] * scale] for pack in PACKS]
    assert "NaN" not in _figure(tmp_path / "run", plan(1, packs)).svg


def test_a_plan_of_thousands_of_packs_is_a_small_picture(tmp_path: Path) -> None:
    packs = [[i % 64, 1, 1, 500, 1, i // 64 * 0.1, (i // 64 + 1) * 0.1] for i in range(4096)]
    assert len(_figure(tmp_path / "run", plan(1, packs, devices=64)).svg) < 700_000
