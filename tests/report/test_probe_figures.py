"""What probes saw, read from metrics.jsonl and drawn: shades at their places, curves against their floors."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.errors import DataError
from megatron_ext.report.metrics import read_run
from megatron_ext.report.page import render
from megatron_ext.report.probe_figures import has_probes, kurtosis_by_site, maps
from megatron_ext.report.shades import LEVELS, Scale
from megatron_ext.report.summary import Phase, arrange
from tests.report.fake_runs import TOKENS_PER_STEP, probe, start, train, write_run
from tests.report.svg import first_drawing, paths, texts


def phases_of(directory: Path, *records: dict[str, Any]) -> list[Phase]:
    return arrange([read_run(write_run(directory / "run", [start(), *(train(step) for step in range(1, 9)), *records]))])


def shades(svg: str) -> dict[float, np.ndarray]:
    """Of a map, the corners of the rectangles by opacity: float [rectangles, corners, 2]. Those of the scale, of 10 x 10, are left out."""
    numbers = {}
    for path, opacity in re.findall(r'<path d="([^"]*)"[^>]*style="fill: var\(--series-0\)(?:; opacity: ([\d.]+))?', svg):
        values = np.array(re.findall(r"-?\d+(?:\.\d+)?", path), dtype=np.float64).reshape(-1, 4, 2)
        if not np.allclose(np.ptp(values[0], axis=0), 10):
            numbers[float(opacity or 1)] = values
    return numbers


def areas(svg: str) -> dict[float, float]:
    return {opacity: float(np.ptp(cells, axis=1).prod(1).sum()) for opacity, cells in shades(svg).items()}


def test_a_probe_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = probe(4, sink_mass=[0.1, None, 0.3, 0.4])
    (record,) = read_run(write_run(tmp_path / "run", [start(), written])).probes
    assert (record.step, record.tokens, record.widths["k"]) == (4, 4 * TOKENS_PER_STEP, 128)
    assert record.sites == written["sites"] and record.floors == written["floors"] and record.gradient_norm == written["gradient_norm"]
    assert record.parameter_gradient_norm == written["parameter_gradient_norm"]
    assert np.isnan(record.sink_mass[1]) and record.sink_mass[2:] == [0.3, 0.4]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sites": [1]}, "sites is [1], expected dict"),
        ({"sites": {"q": {"variance": 1.0}}}, "sites.q.variance is 1.0, expected list"),
        ({"sites": {"q": {"variance": [1.0, "x"]}}}, "sites.q.variance[1] is 'x', expected float"),
        ({"sites": {"z": {"variance": [1.0]}}}, "sites.z has no width"),
        ({"sites": {"q": {"variance": [1.0], "max_to_mean": [1.0, 2.0]}}}, "lists of several lengths"),
        ({"widths": {"q": 1.5}}, "widths.q is 1.5, expected int"),
        ({"max_logit": {"0": 1.0}}, "max_logit is {'0': 1.0}"),
    ],
)
def test_a_malformed_probe_is_refused_with_its_line(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    directory = write_run(tmp_path / "run", [start(), json.dumps(probe(1) | changes)])
    with pytest.raises(DataError, match=re.escape(reason)) as caught:
        read_run(directory)
    assert "metrics.jsonl:2" in str(caught.value)


def test_after_a_resume_later_probes_do_not_count(tmp_path: Path) -> None:
    records = [start(), probe(2), probe(4), probe(6), start(step=3), probe(4, layers=2)]
    run = read_run(write_run(tmp_path / "run", records))
    assert [(record.step, len(record.sink_mass)) for record in run.probes] == [(2, 4), (4, 2)]


def test_shades_go_from_the_lowest_to_the_highest_value() -> None:
    seen = Scale(1.0, 100.0, True).shades(np.array([0.0, 0.5, 1.0, 10.0, 100.0, 1e9, np.nan, np.inf]))
    np.testing.assert_array_equal(seen, [0, 0, 0, 4, LEVELS - 1, LEVELS - 1, np.nan, LEVELS - 1])
    np.testing.assert_array_equal(Scale(0.0, 9.0, False).shades(np.arange(10.0)), np.arange(10.0))
    np.testing.assert_array_equal(Scale(3.0, 3.0, True).shades(np.array([3.0, np.nan])), [1, np.nan] * np.array([LEVELS - 1, 1]))


def test_a_map_has_a_row_a_layer_and_a_column_a_probe(tmp_path: Path) -> None:
    """Of 3 layers and probes after 2 and 8 steps, one value is the largest: its cell spans a third of the height and 6/8 of the width."""
    sinks = [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    phases = phases_of(tmp_path, *(probe(step, layers=3, sink_mass=sink) for step, sink in zip((2, 8), sinks, strict=True)))
    svg = next(figure for figure in maps(phases) if figure.title == "Attention sink").svg
    cells = shades(svg)
    (strong,) = cells[1.0]
    everything = np.concatenate([each.reshape(-1, 2) for each in cells.values()])
    left, bottom = everything.min(0)
    width, height = np.ptp(everything, axis=0)
    np.testing.assert_allclose((strong.min(0) - [left, bottom]) / [width, height], [2 / 8, 1 / 3], atol=1e-3)
    np.testing.assert_allclose(np.ptp(strong, axis=0) / [width, height], [6 / 8, 1 / 3], atol=1e-3)
    assert {"1", "2", "3", "layer", "0"} <= set(texts(svg)) and "uniform attention gives 0.05" in figure_of(
        phases, "Attention sink"
    ).caption


def figure_of(phases: list[Phase], title: str) -> Any:
    return next(figure for figure in maps(phases) if figure.title == title)


def test_layers_without_a_site_stay_empty(tmp_path: Path) -> None:
    def with_norm(values: list[float | None]) -> dict[str, Any]:
        record = probe(8, layers=2)
        record["sites"]["input_layernorm"] = {name: values for name in record["sites"]["q"]}
        return record

    whole, half = (phases_of(tmp_path / str(number), with_norm([9.0, last])) for number, last in enumerate((9.0, None)))
    sizes = [areas(figure_of(phases, "Kurtosis: input_layernorm").svg) for phases in (whole, half)]
    assert len(sizes[0]) == len(sizes[1]) == 1 and sum(sizes[1].values()) == pytest.approx(sum(sizes[0].values()) / 2, rel=1e-3)


def test_outliers_are_darker_than_the_noise_of_other_sites(tmp_path: Path) -> None:
    phases = phases_of(tmp_path, *(probe(step, outlier=300.0) for step in (2, 4, 8)))
    residual, q = (areas(figure_of(phases, f"Kurtosis: {site}").svg) for site in ("residual", "q"))
    assert min(residual) > 0.7 and sum(area for opacity, area in q.items() if opacity > 0.5) < 0.2 * sum(q.values())


def test_curves_end_at_the_mean_over_layers_and_floors_lie_below(tmp_path: Path) -> None:
    phases = phases_of(tmp_path, probe(1, outlier=1.0), probe(8, outlier=50.0))
    svg = first_drawing(kurtosis_by_site(phases).svg)
    last = phases[0].run.probes[-1].sites["residual"]["kurtosis_released"]
    assert f"residual {sum(last) / len(last):.3g}" in texts(svg) and "512 channels: 0.09" in texts(svg)
    residual = next(path for path in paths(svg, "var(--series-0); stroke-width: 2") if len(path) == 2)
    floors = [path[0, 1] for path in paths(svg, "stroke-dasharray") if len(path) == 2]
    assert len(floors) == 3 and min(floors) > residual[:, 1].max(), "higher on a page is a smaller y"


def test_maps_of_many_layers_and_probes_stay_small(tmp_path: Path) -> None:
    phases = phases_of(tmp_path, *(probe(step, layers=64, outlier=step / 100) for step in range(1, 121)))
    svgs = [figure.svg for figure in maps(phases)]
    assert len(svgs) == 17 and sum(map(len, svgs)) < 2_000_000


def test_the_page_has_the_section_where_there_are_probes(tmp_path: Path) -> None:
    probed, plain = phases_of(tmp_path / "a", probe(1), probe(8)), phases_of(tmp_path / "b")
    text = render(probed)
    assert has_probes(probed) and "Inside the model" in text and "#fe01" not in text
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids)) > 100
    assert not has_probes(plain) and "Inside the model" not in render(plain)


@pytest.mark.filterwarnings("error")
def test_values_that_are_not_finite_or_all_zero_are_drawn(tmp_path: Path) -> None:
    broken = probe(8, gradient_norm=[float("inf"), float("nan"), 0.0, 1.0, 2.0], sink_mass=[0.0] * 4, max_logit=[3.0] * 4)
    for measure in broken["sites"]["q"]:
        broken["sites"]["q"][measure] = [0.0] * 4
    broken["sites"]["v"] = {name: [None] * 4 for name in broken["sites"]["v"]}
    broken["parameter_gradient_norm"] = [None] * 4
    text = render(phases_of(tmp_path, broken))
    assert (
        "Gradient norm: parameters" not in text
        and "Gradient norm: residual" in text
        and "Kurtosis: q" in text
        and "Kurtosis: v" not in text
    )
