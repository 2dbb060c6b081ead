import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.report import canvas


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(10, 30)), min_size=1, max_size=12))
def test_spread_boxes_do_not_overlap_and_move_only_when_they_must(boxes: list[tuple[float, int]]) -> None:
    boxes.sort()
    centers, heights = np.array([box[0] for box in boxes]), np.array([box[1] for box in boxes], dtype=float)
    placed = canvas.spread(centers, heights)
    assert (np.diff(placed) >= (heights[:-1] + heights[1:]) / 2 - 1e-6).all()
    assert np.mean(placed) == pytest.approx(np.mean(centers), abs=1e-6)
    if (np.diff(centers) >= (heights[:-1] + heights[1:]) / 2).all():
        np.testing.assert_allclose(placed, centers, atol=1e-6)


def test_thin_keeps_ends_and_spikes_of_a_long_run() -> None:
    x = np.arange(100_000.0)
    y = np.random.default_rng(0).normal(size=100_000)
    y[54_321], y[7] = 1e6, np.nan
    kept_x, kept_y = canvas.thin(x, y)
    assert len(kept_x) < 500
    assert (kept_x[0], kept_x[-1]) == (0, 99_999)
    assert kept_y[kept_x == 54_321] == 1e6
    assert kept_y[kept_x == 0] == y[0]
    short = canvas.thin(x[:300], y[:300])
    np.testing.assert_array_equal(short[1], y[:300])


def test_smooth_is_the_weighted_mean_of_the_past() -> None:
    values, weights = np.array([4.0, 2.0, np.nan, 1.0] + [3.0] * 196), np.ones(200)
    weights[1] = 3.0
    smoothed = canvas.smooth(values, weights)
    assert smoothed[0] == 4.0
    assert smoothed[1] == pytest.approx((0.75 * 4 + 3 * 2) / (0.75 + 3))
    assert smoothed[2] == smoothed[1]
    assert smoothed[-1] == pytest.approx(3.0, abs=1e-6)
    np.testing.assert_array_equal(canvas.smooth(values[:2], weights[:2]), values[:2])  # a short run is not smoothed


def test_svg_takes_colours_from_the_page_and_keeps_ids_apart() -> None:
    def draw(name: str) -> str:
        figure, (axes,) = canvas.new_figure(300, 200)
        axes.plot([0, 1], [2, 3], color=canvas.series_color(9), marker="o")
        canvas.write(axes, 0, 2, "a$x$ <b> & ^_", canvas.stand_in("ink"))
        return canvas.to_svg(figure, name, 'says "this"', "wide")

    one, two = draw("one"), draw("two")
    assert one.startswith('<svg class="wide" role="img" aria-label="says &quot;this&quot;" viewBox="0 0 300 200">')
    assert "stroke: var(--series-1)" in one
    assert "#fe01" not in one
    assert ">a$x$ &lt;b&gt; &amp; ^_</text>" in one
    ids = [re.findall(r'\bid="([^"]*)"', svg) for svg in (one, two)]
    assert len(set(ids[0])) == len(ids[0]) > 10
    assert not set(ids[0]) & set(ids[1])
    assert set(re.findall(r'href="#([^"]*)"', one)) <= set(ids[0])
    assert draw("one") == one
