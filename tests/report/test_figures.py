import re
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.report import figures
from megatron_ext.report.metrics import read_run
from megatron_ext.report.summary import Phase, arrange
from tests.report.fake_runs import TOKENS_PER_STEP, evaluation, start, train, write_run
from tests.report.svg import first_drawing, paths, texts


@pytest.fixture
def phases(tmp_path: Path) -> list[Phase]:
    """Four steps on prose, then two that also read code, and a control of two steps."""
    first = [start(), evaluation(0, "prose", 8.0), *(train(i) for i in range(1, 5)), evaluation(4, "prose", 4.0)]
    second = [start("continual"), evaluation(0, "prose", 4.0), train(1), train(2), evaluation(2, "prose", 5.0)]
    control = [start("continual"), evaluation(0, "prose", 4.0), train(1), train(2), evaluation(2, "prose", 6.0)]
    runs = [read_run(write_run(tmp_path / name, records)) for name, records in (("a", first), ("b", second), ("c", control))]
    return arrange(runs[:2], {"control": runs[2]})


def test_the_forgetting_curve_joins_phases_at_their_border(phases: list[Phase]) -> None:
    svg = figures.forgetting_curve(phases).svg
    wide = first_drawing(svg)
    first, second, control = (path for path in paths(wide, "var(--series-0); stroke-width: 2") if len(path) == 2)
    (border,) = (path for path in paths(wide, "var(--muted)") if len(path) == 2 and path[0, 0] == path[1, 0])
    np.testing.assert_allclose(first[1], second[0], atol=0.01)
    np.testing.assert_allclose(second[0], control[0], atol=0.01)
    assert border[0, 0] == pytest.approx(second[0, 0], abs=0.01)
    # x is proportional to tokens: four steps, then two; y to the loss: down by 4, up by 1 and by 2
    steps = np.diff([first[0, 0], first[1, 0], second[1, 0]])
    assert steps[0] / steps[1] == pytest.approx(4 / 2, rel=1e-4)
    rises = [path[0, 1] - path[1, 1] for path in (first, second, control)]
    assert rises[0] / rises[1] == pytest.approx(-4, rel=1e-4)
    assert rises[2] / rises[1] == pytest.approx(2, rel=1e-4)


def test_the_unigram_entropy_is_a_level_between_its_neighbouring_losses(phases: list[Phase]) -> None:
    svg = figures.forgetting_curve(phases).svg
    curve = next(path for path in paths(svg, "var(--series-0); stroke-width: 2") if len(path) == 2)
    level = next(path for path in paths(svg, "stroke-dasharray: 1.5,2.475") if len(path) == 2)
    height = np.interp(6.41, [4.0, 8.0], [curve[1, 1], curve[0, 1]])
    assert level[:, 1].tolist() == pytest.approx([height, height], abs=0.01)


def test_forgetting_in_percent_is_relative_to_the_start_of_the_phase(phases: list[Phase]) -> None:
    figure = figures.forgetting_in_percent(phases)
    assert {"prose +25.0 %", "prose +50.0 %"} <= set(texts(figure.svg))
    second, control = paths(figure.svg, "var(--series-0); stroke-width: 2")
    zero = next(path for path in paths(figure.svg, "stroke: var(--muted); stroke-linecap") if len(path) == 2)
    assert second[0, 1] == control[0, 1] == pytest.approx(zero[0, 1], abs=0.01)
    assert (zero[0, 1] - control[1, 1]) / (zero[0, 1] - second[1, 1]) == pytest.approx(50 / 25, rel=1e-3)
    assert figures.forgetting_in_percent(phases[:1]) is None


def test_training_loss_shows_every_step(tmp_path: Path) -> None:
    losses = [5.0, 3.0, 4.0, 2.0]
    run = read_run(write_run(tmp_path / "run", [start(), *(train(i + 1, losses[i]) for i in range(4))]))
    svg = figures.training_loss(arrange([run])).svg
    (faint,) = paths(svg, "stroke-opacity: 0.35; stroke-width: 0.8")
    assert len(faint) == 4
    slope = (faint[1, 1] - faint[0, 1]) / (losses[1] - losses[0])
    np.testing.assert_allclose(faint[:, 1], faint[0, 1] + slope * (np.array(losses) - losses[0]), atol=0.01)


def test_bars_are_shares_of_documents_between_powers_of_two(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", [start(), train(1, length_histogram={"64": 2, "128": 6, "512": 4})]))
    svg = figures.document_lengths(arrange([run])).svg
    bars = [path for path in paths(svg, "fill: var(--series-0)") if len(path) >= 4]
    heights = np.array([np.ptp(bar[:, 1]) for bar in bars])
    np.testing.assert_allclose(heights / heights.max(), [2 / 6, 1, 0, 4 / 6], atol=1e-4)
    words = texts(svg)
    assert {"32", "64", "128", "256", "512", "40 %", "pretrain: 12 documents"} <= set(words)
    assert not any(text.endswith("00 %") and text != "100 %" for text in words)


def test_skipped_steps_are_marked_where_they_happened(tmp_path: Path) -> None:
    steps = [train(1), train(2, grad_norm=float("inf"), skipped_steps=1), *(train(i, skipped_steps=1) for i in range(3, 9))]
    svg = figures.gradient_norm(arrange([read_run(write_run(tmp_path / "run", [start(), *steps]))])).svg
    markers = re.findall(r'<use [^>]*x="([\d.]+)"[^>]*style="fill: var\(--series-1\)', svg)
    ticks = dict(
        zip(("0", "20 k", "40 k", "60 k"), re.findall(r'<use [^>]*x="([\d.]+)"[^>]*style="fill: var\(--muted\)', svg), strict=False)
    )
    per_token = (float(ticks["60 k"]) - float(ticks["0"])) / 60_000
    assert [float(x) for x in markers] == pytest.approx([float(ticks["0"]) + 2 * TOKENS_PER_STEP * per_token], abs=0.05)
    assert set(ticks) <= set(texts(svg))


def test_figures_without_data_are_left_out(tmp_path: Path) -> None:
    bare = {"kind": "train", "time": 1, "step": 1, "tokens": 5, "loss": 4.0}
    phases = arrange([read_run(write_run(tmp_path / "run", [start(), bare]))])
    assert figures.all_figures(phases) == []
    assert figures.forgetting_curve(phases) is None
