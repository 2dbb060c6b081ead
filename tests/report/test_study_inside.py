"""What probes saw in a study: numbers from the records, and pictures that show them."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.report import study_inside
from megatron_ext.report.metrics import read_run
from megatron_ext.report.study import Variant
from megatron_ext.report.study_inside_figures import depth_figures, kurtosis_figure
from megatron_ext.report.study_page import render_study
from tests.report.fake_runs import evaluation, probe, start, train, write_run
from tests.report.svg import first_drawing, paths, texts
from tests.report.test_page import Page


def variant(directory: Path, name: str, outliers: Sequence[float], layers: int = 4, norms: Sequence[float] = ()) -> Variant:
    """A run a seed, looked into at steps 1 and 2; the second time with an outlier."""
    runs = {}
    for seed, outlier in enumerate(outliers):
        steps = [train(step, grad_norm=norm) for step, norm in enumerate(norms or (1.0, 1.0), 1)]
        records = [
            start(),
            evaluation(0, "prose", 8.0),
            *steps,
            probe(1, layers),
            probe(2, layers, outlier=outlier),
            evaluation(2, "prose", 5.0),
        ]
        runs[seed] = read_run(write_run(directory / name / str(seed), records))
    return Variant(name, None, {}, runs)


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> list[Variant]:
    folder = tmp_path_factory.mktemp("inside")
    return [variant(folder, "plain", (40.0, 50.0)), variant(folder, "safe <x>", (0.0, 0.01), layers=6)]


def test_numbers_are_those_of_the_last_probe(variants: list[Variant]) -> None:
    wild, safe = (study_inside.kurtosis(each, "residual") for each in variants)
    seen = [np.mean(run.probes[1].sites["residual"]["kurtosis_released"]) for run in variants[0].runs]
    assert wild == pytest.approx((np.mean(seen), min(seen), max(seen))) and wild.low > 100 > 1 > safe.high
    assert np.isnan(study_inside.kurtosis(variants[0], "absent").mean)
    assert study_inside.floors(variants)["residual"] == pytest.approx(0.4 * (24 / 512) ** 0.5)
    assert study_inside.variances(variants[1]).shape == (2, 7)
    assert study_inside.growth(study_inside.variances(variants[0])).mean == pytest.approx(2**4)
    assert study_inside.growth(study_inside.gradient_norms(variants[1])).mean == pytest.approx(0.8**-6)


def test_spikes_are_steps_far_above_those_before(tmp_path: Path) -> None:
    norms = [1.0] * 20 + [2.9, 3.1, 1.0, float("nan"), 1.0]
    assert [study_inside.spikes(run) for run in variant(tmp_path, "wild", (0.0,), norms=norms).runs] == [2]
    assert [study_inside.spikes(run) for run in variant(tmp_path, "short", (0.0,), norms=[1.0, 9.0]).runs] == [0]


def test_the_page_shows_them(variants: list[Variant], tmp_path: Path) -> None:
    page = Page(render_study("Norms", variants))
    table = page.tables[1]
    assert table[0][1] == "kurtosis: residual (0.09)" and table[0][-1] == "spikes" and table[2][0] == "safe <x>"
    assert table[1][-3:] == ["16 x", "2.44 x", "0"]
    assert "Inside the models" in page.text and {"Excess kurtosis by site", "Variance by depth", "Gradient norm by depth"} <= set(
        page.titles
    )
    unseen = Variant("unseen", None, {}, {0: read_run(write_run(tmp_path / "run", [start(), train(1), evaluation(1, "prose", 5.0)]))})
    assert "Inside the models" not in Page(render_study("Norms", [*variants, unseen])).text


def test_pictures_put_every_variant_and_every_floor_in_its_place(variants: list[Variant]) -> None:
    drawing = first_drawing(kurtosis_figure(variants).svg)
    assert {"residual", "attention output", "down_proj input"} <= set(texts(drawing))
    assert len(paths(drawing, "stroke: var(--muted); stroke-width: 1.5")) == 8, "a floor for each site"
    variance, gradient = depth_figures(variants)
    deep, shallow = (paths(first_drawing(variance.svg), f"stroke: var(--series-{number}); stroke-width: 2")[0] for number in (1, 0))
    assert deep[-1, 0] > shallow[-1, 0] and deep[-1, 1] < shallow[-1, 1], "more blocks reach further, and higher"
    assert {"plain", escape("safe <x>"), "blocks behind"} <= set(texts(first_drawing(gradient.svg)))
