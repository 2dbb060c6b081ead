from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.report import plan_figures
from megatron_ext.report.gantt import degree_color
from megatron_ext.report.metrics import read_run
from megatron_ext.report.summary import Phase, arrange
from tests.report.fake_runs import TOKENS_PER_STEP, shared, start, train, write_run
from tests.report.svg import paths, texts


def _phases(directory: Path, *records: dict[str, Any]) -> list[Phase]:
    return arrange([read_run(write_run(directory, [start(), *records]))])


def _titles(phases: list[Phase]) -> set[str]:
    return {figure.title for figure in plan_figures.curves(phases)}


def test_degrees_are_stacked_to_the_whole_of_each_step(tmp_path: Path) -> None:
    counts = [{"1": 1000, "8": 3000}, {"1": 500, "2": 1500}, {"8": 100}]
    phases = _phases(tmp_path / "run", *(shared(i + 1, tokens_by_degree=counts[i]) for i in range(3)))
    figure = plan_figures.degrees(phases)
    tops = {degree: paths(figure.svg, f"fill: var(--{degree_color(degree)})") for degree in (1, 2, 8)}
    bottom, top = max(path[:, 1].max() for path in tops[8]), min(path[:, 1].min() for path in tops[8])
    # each area reaches from zero to the sum of the shares up to its degree: two corners a step, after the first corner on the ground
    for degree, wanted in ((1, [0.25, 0.25, 0.0]), (2, [0.25, 1.0, 0.0]), (8, [1.0, 1.0, 1.0])):
        (area,) = tops[degree]
        heights = (bottom - area[1:7:2, 1]) / (bottom - top)
        np.testing.assert_allclose(heights, wanted, atol=1e-3)
    assert [text for _, text in figure.legend] == ["degree 1: 24.6 %", "degree 2: 24.6 %", "degree 8: 50.8 %"]
    assert {"0 %", "50 %", "100 %"} <= set(texts(figure.svg))


def test_shares_of_many_steps_are_taken_together(tmp_path: Path) -> None:
    steps = [shared(i, tokens_by_degree={"1": i, "4": 500}) for i in range(1, 501)]
    phases = _phases(tmp_path / "run", *steps)
    edges, shares = plan_figures.degree_shares(phases[0].run, [1, 4])
    assert shares.shape == (2, 120) and len(edges) == 121
    assert (edges[0], edges[-1]) == (0, 500 * TOKENS_PER_STEP)
    np.testing.assert_allclose(shares.sum(axis=0), 1)
    inside = np.arange(edges[7] / TOKENS_PER_STEP + 1, edges[8] / TOKENS_PER_STEP + 1)
    assert shares[0, 7] == pytest.approx(inside.sum() / (inside.sum() + 500 * len(inside)))
    assert "Up to 5 neighbouring steps are taken together." in plan_figures.degrees(phases).caption


def test_steps_of_old_versions_are_a_gap(tmp_path: Path) -> None:
    phases = _phases(tmp_path / "run", train(1), train(2), shared(3), train(4), shared(5))
    _, shares = plan_figures.degree_shares(phases[0].run, [1, 4])
    np.testing.assert_array_equal(shares, [[np.nan, np.nan, 0.25, np.nan, 0.25], [np.nan, np.nan, 0.75, np.nan, 0.75]])
    figure = plan_figures.degrees(phases)
    assert "nan" not in figure.svg.lower()
    assert [text for _, text in figure.legend] == ["degree 1: 25.0 %", "degree 4: 75.0 %"]
    assert "nan" not in plan_figures.gap(phases).svg.lower()


def test_the_gap_and_the_share_of_exchanges_are_drawn_as_recorded(tmp_path: Path) -> None:
    gaps, exchanges = [0.02, 0.08, 0.04], [0.1, 0.4, 0.3]
    steps = [shared(i + 1, plan_gap=gaps[i], exchange_seconds=exchanges[i], step_seconds=2.0) for i in range(3)]
    phases = _phases(tmp_path / "run", *steps)
    for figure, values in ((plan_figures.gap(phases), gaps), (plan_figures.exchanges(phases), exchanges)):
        (faint,) = paths(figure.svg, "stroke-opacity: 0.4; stroke-width: 0.8")
        slope = (faint[1, 1] - faint[0, 1]) / (values[1] - values[0])
        assert slope < 0
        np.testing.assert_allclose(faint[:, 1], faint[0, 1] + slope * (np.array(values) - values[0]), atol=0.01)
    assert {"0 %", "2.5 %", "5 %"} <= set(texts(plan_figures.gap(phases).svg))


def test_figures_without_anything_to_show_are_left_out(tmp_path: Path) -> None:
    every = {"Tokens by degree", "Gap to the lower bound", "Time in exchanges", "Waiting for plans"}
    assert _titles(_phases(tmp_path / "stall", shared(1, step_seconds=2.0, plan_stall_seconds=0.03))) == every
    assert _titles(_phases(tmp_path / "ready", shared(1, step_seconds=2.0, plan_stall_seconds=0.02))) == every - {"Waiting for plans"}
    nothing = shared(1, plan_gap=0.0, exchange_seconds=0.0)
    assert _titles(_phases(tmp_path / "unmeasured", nothing, nothing | {"step": 2})) == {"Tokens by degree"}
    assert _titles(_phases(tmp_path / "old", train(1))) == set()
