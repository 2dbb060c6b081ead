import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytest
from rich.console import Console

from megatron_ext.errors import DataError
from megatron_ext.report import study, study_figures
from megatron_ext.report.metrics import Run, read_run
from megatron_ext.report.study import Spread, Variant
from megatron_ext.report.study_console import print_study
from megatron_ext.report.study_page import render_study, write_study
from tests.report.fake_runs import TOKENS_PER_STEP, evaluation, start, train, write_run
from tests.report.svg import first_drawing, paths, texts
from tests.report.test_page import Page

STEPS = 20
EVERY = 5


def losses_to(final: float, first: float = 8.0) -> list[float]:
    """Validation losses at steps 0, 5, 10, 15 and 20."""
    return [final + (first - final) * 0.5**n for n in range(STEPS // EVERY)] + [final]


def fake(directory: Path, losses: Sequence[float], *, begin: float, step_seconds: float = 1.0, **changes: Any) -> Run:
    """A finished run that was evaluated every fifth step; its training losses are those of the evaluation before, plus 0.1."""
    records = [start(directory.name, time=begin, total_steps=STEPS, **changes)]
    for step in range(STEPS + 1):
        time = begin + step * step_seconds
        if step:
            records.append(train(step, losses[(step - 1) // EVERY] + 0.1, time=time, step_seconds=step_seconds))
        if step % EVERY == 0:
            records.append(evaluation(step, "prose", losses[step // EVERY], time=time))
    records.append({"kind": "event", "event": "save", "time": time + 0.5, "step": STEPS})
    return read_run(write_run(directory, records))


def two_variants(directory: Path) -> list[Variant]:
    """Best values in the middle and at the edge of their sweeps, three seeds, the second variant 2 % better and 1.5 times as slow."""
    finals = {"plain": {0.001: 5.5, 0.002: 5.0, 0.004: 5.2}, "better [x]": {0.001: 5.3, 0.01: 4.9}}
    key, best, seconds = {"plain": "optimizer.lr", "better [x]": "optimizer.muon.lr"}, {"plain": 0.002, "better [x]": 0.01}, [1.0, 1.5]
    variants, begin = [], 1.7e9
    for (name, sweep), speed in zip(finals.items(), seconds, strict=True):
        runs = {}
        for value, final in sweep.items():
            runs[value] = fake(directory / name / str(value), losses_to(final), begin=begin, step_seconds=speed)
            begin += 100
        seeds = {1: runs[best[name]]}
        for seed in (2, 3):
            final = sweep[best[name]] + 0.01 * seed * (1 if speed == 1 else -1)
            seeds[seed] = fake(directory / name / f"seed {seed}", losses_to(final), begin=begin, step_seconds=speed)
            begin += 100
        variants.append(Variant(name, key[name], runs, seeds, f"python pretrain.py {name}"))
    return variants


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> list[Variant]:
    return two_variants(tmp_path_factory.mktemp("study"))


def lines_of(run: Run, kind: str) -> list[dict[str, Any]]:
    """Records as they stand in the file, read without the reader of reports."""
    return [record for record in map(json.loads, (run.directory / "metrics.jsonl").open()) if record["kind"] == kind]


def test_the_best_value_has_the_lowest_final_loss(variants: list[Variant], tmp_path: Path) -> None:
    assert [variant.best for variant in variants] == [0.002, 0.01]
    broken = fake(tmp_path / "nan", [8.0, 2.0, 2.0, 2.0, math.nan], begin=0.0)
    assert study.best_value({0.1: broken, **variants[0].sweep}) == 0.002
    assert study.best_value({0.3: variants[0].sweep[0.001], 0.2: variants[0].sweep[0.001]}) == 0.3
    with pytest.raises(DataError, match="no value of the sweep 0.1 ended with a finite loss"):
        study.best_value({0.1: broken})


def test_the_table_is_what_the_metrics_say(variants: list[Variant]) -> None:
    table = study.results(variants)
    assert table[0].difference is None and table[0].step_ratio == Spread(1.0, 1.0, 1.0)
    plain, better = ([lines_of(run, "eval")[-1]["loss"] for run in variant.runs] for variant in variants)
    assert table[1].validation == pytest.approx((mean(better), min(better), max(better)))
    changes = [100 * (mine / theirs - 1) for mine, theirs in zip(better, plain, strict=True)]
    assert table[1].difference == pytest.approx((mean(changes), min(changes), max(changes)))
    assert table[1].difference.high == pytest.approx(-2.0)
    # The last tenth of twenty equal steps are two.
    trained = [mean(record["loss"] for record in lines_of(run, "train")[-2:]) for run in variants[1].runs]
    assert table[1].training == pytest.approx((mean(trained), min(trained), max(trained)))
    assert table[1].step_seconds.mean == median(record["step_seconds"] for record in lines_of(variants[1].runs[0], "train")) == 1.5
    assert table[1].step_ratio == Spread(1.5, 1.5, 1.5)
    assert table[1].whole_ratio.mean == pytest.approx((20 * 1.5 + 0.5) / 20.5)


def test_corpora_count_by_their_tokens(tmp_path: Path) -> None:
    records = [start(), train(1), evaluation(1, "prose", 4.0, eval_tokens=300), evaluation(1, "code", 2.0, eval_tokens=100)]
    assert study.validation_loss(read_run(write_run(tmp_path / "run", records))) == 3.5
    with pytest.raises(DataError, match=r"none: no evaluation in metrics.jsonl"):
        study.validation_loss(read_run(write_run(tmp_path / "none", [start(), train(1)])))


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([8.0, 6.0, 5.0, 4.5, 4.4], False),
        ([8.0, 6.0, 5.0, 5.5, 5.6], False),
        ([8.0, 6.0, 5.0, 6.4, 6.6], True),
        ([8.0, 9.0, 9.0, 9.0, 8.1], True),
        ([8.0, 6.0, 5.0, 4.5, math.nan], True),
        ([8.0, 6.0, 5.0, math.nan, math.inf], True),
        ([8.0, 8.0, 8.0, 8.0, 8.0], False),
    ],
)
def test_a_run_diverged_if_it_lost_more_than_half_of_what_it_had_learned(tmp_path: Path, losses: list[float], expected: bool) -> None:
    assert study.diverged(fake(tmp_path / "run", losses, begin=0.0)) is expected


def test_warnings_name_edges_and_nothing_else_where_all_is_well(variants: list[Variant]) -> None:
    expected = "better [x]: the best value, optimizer.muon.lr 1e-2, is the largest of its sweep; one beyond it may be better."
    assert study.warnings(variants) == [expected]
    lower = Variant("lower", "lr", {value: variants[0].sweep[value] for value in (0.002, 0.004)}, variants[0].seeds)
    assert "lower: the best value, lr 2e-3, is the smallest of its sweep" in study.warnings([lower])[0]


def test_warnings_name_what_spoils_the_comparison(variants: list[Variant], tmp_path: Path) -> None:
    wild = fake(tmp_path / "wild", [8.0, 6.0, 5.0, 7.0, 7.5], begin=0.0)
    skipping = [start(), evaluation(0, "prose", 8.0), train(1), train(2, skipped_steps=1), evaluation(2, "prose", 5.0)]
    skipped = read_run(write_run(tmp_path / "skipped", skipping))
    moved = fake(tmp_path / "moved", losses_to(5.0), begin=5.0, device="NVIDIA H100")
    sweep = {0.1: wild, 0.2: moved, 0.3: skipped}
    text = "\n".join(study.warnings([Variant("odd", "lr", sweep, {1: moved}), Variant("short", None, {}, {1: skipped})]))
    assert "odd, lr 1e-1 diverged: it ended at a loss of 7.500" in text
    assert "short, seed 1 skipped 1 of 2 steps" in text and "odd, lr 3e-1 skipped" in text
    assert "one seed" in text and "different numbers of tokens: odd 163,840, short 16,384" in text
    assert "2 x NVIDIA H100; 2 x cpu" in text
    together = [
        Variant(name, None, {}, {1: fake(tmp_path / name, losses_to(5.0), begin=begin)}) for name, begin in (("a", 0.0), ("b", 19.0))
    ]
    assert any("shared the machine" in warning for warning in study.warnings(together))
    assert not any("shared the machine" in warning for warning in study.warnings(variants))


def test_the_headline_says_who_is_lowest_and_whether_seeds_agree(variants: list[Variant], tmp_path: Path) -> None:
    assert study.headline(variants) == (
        "better [x] ended with the lowest validation loss, 4.883; -2.66 % against plain (-3.18 % to -2.00 % over 3 seeds)."
    )
    assert study.headline(variants[::-1]).startswith(
        "better [x] ended with the lowest validation loss, 4.883; the next, plain, is at +2.73 %"
    )
    seeds = {seed: fake(tmp_path / str(seed), losses_to(final), begin=100.0 * seed) for seed, final in ((1, 4.9), (2, 5.1), (3, 4.9))}
    assert study.headline([variants[0], Variant("torn", None, {}, seeds)]).endswith("Not every seed agrees on which of the two is better.")
    lost = Variant("lost", None, {}, {1: fake(tmp_path / "lost", [8.0, 5.0, 5.0, 5.0, math.nan], begin=0.0)})
    assert study.headline([lost]) == "No variant ended with a finite loss at all seeds."


def test_the_page_shows_the_numbers(variants: list[Variant], tmp_path: Path) -> None:
    write_study("A <study>", variants, tmp_path / "index.html")
    page = Page((tmp_path / "index.html").read_text("utf-8"))
    final, runs = page.tables
    names = ["variant", "validation loss", "to plain", "training loss", "time of a step", "whole time", "one run", "setting"]
    assert final[0] == names
    assert final[1][:3] == ["plain", "5.0175.000 to 5.030", ""]
    assert final[2][:3] == ["better [x]", "4.8834.870 to 4.900", "\u22122.66 %\u22123.18 % to \u22122.00 %"]
    assert final[2][4:] == ["1.50 x", "1.49 x", "30.5 s", "optimizer.muon.lr 1e-2"]
    assert len(runs) == 1 + 5 + 4 and runs[2][:2] == ["plain, optimizer.lr 2e-3", "5.000"] and runs[2][-1] == "best of the sweep"
    assert page.titles[:2] == ["Validation loss", "Validation loss relative to plain"]
    assert "A <study>" in page.text and "python pretrain.py better [x]" in page.text and "is the largest of its sweep" in page.text
    assert not {"script", "link", "img"} & set(page.tags) and "http" not in page.text
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 20


def test_curves_end_at_their_means_and_bands_hold_all_seeds(variants: list[Variant]) -> None:
    figure = study_figures.validation_figure(variants)
    drawing = first_drawing(figure.svg)
    assert {"plain 5.017", "better [x] 4.883"} <= set(texts(drawing)) and "Before the first step the loss is 8.000" in figure.caption
    (mean_path,) = paths(drawing, "stroke: var(--series-1); stroke-width: 2")
    (band,) = paths(drawing, "fill: var(--series-1)")
    # Pixels grow downwards: at the end the lowest seed is 0.0133 below the mean, the highest 0.0167 above it.
    end = band[band[:, 0] > band[:, 0].max() - 0.01][:, 1]
    below, above = end.max() - mean_path[-1, 1], mean_path[-1, 1] - end.min()
    assert above > below > 0 and above / below == pytest.approx((4.9 - 4.88333) / (4.88333 - 4.87), rel=0.01)
    difference = study_figures.difference_figure(variants)
    assert {"plain", "better [x] \u22122.66 %"} <= set(texts(first_drawing(difference.svg)))
    assert study_figures.difference_figure(variants[:1]) is None


def test_a_diverged_run_is_a_cross_and_does_not_stretch_the_axes(variants: list[Variant], tmp_path: Path) -> None:
    (calm,) = study_figures.sweep_figures(variants[:1])
    wild = fake(tmp_path / "wild", [8.0, 6.0, 5.0, 80.0, 90.0], begin=0.0)
    swept = Variant("plain", "optimizer.lr", {**variants[0].sweep, 0.008: wild}, variants[0].seeds)
    (figure,) = study_figures.sweep_figures([swept])
    assert {"1e-3", "2e-3", "4e-3", "8e-3", "plain 5.000", "lr"} <= set(texts(figure.svg))
    numbers = lambda svg: [text for text in texts(svg) if text.replace(".", "").isdigit()]  # noqa: E731
    assert numbers(figure.svg) == numbers(calm.svg)
    assert figure.svg.count("<use") == calm.svg.count("<use") + 2  # the cross, and the tick of its value


def test_variants_without_a_sweep_and_with_one_seed(tmp_path: Path) -> None:
    alone = Variant("alone", None, {}, {7: fake(tmp_path / "alone", losses_to(5.0), begin=0.0)})
    page = Page(render_study("One", [alone]))
    assert page.titles == ["Validation loss", "Validation loss over time", "Training loss"]
    assert page.tables[0][1] == ["alone", "5.000", "", "5.475", "1.00 x", "1.00 x", "20.5 s", ""]
    assert "of seed 7" in page.text and "There is one seed" in page.text


@pytest.mark.parametrize("width", [40, 160])
def test_the_terminal_shows_the_same(variants: list[Variant], width: int) -> None:
    """All of it: on a narrow one lines of tables are longer than it is."""
    console = Console(width=width, record=True, file=io.StringIO())
    print_study(variants, console)
    text = console.export_text()
    assert "…" not in text and console.width == width
    words = " ".join(text.split())
    assert "better [x] ended with the lowest validation loss" in words and "warning: better [x]: the best value" in words
    assert "swept: plain, optimizer.lr: 1e-3 5.500, 2e-3 5.000, 4e-3 5.200" in words
    assert ["better", "[x]", "4.883", "-2.66", "%"] in [line.split()[:5] for line in text.splitlines()]


def test_many_variants_keep_apart(variants: list[Variant]) -> None:
    many = [Variant(f"v{index}", None, {}, variants[0].seeds) for index in range(9)]
    drawing = first_drawing(study_figures.validation_figure(many).svg)
    assert len(paths(drawing, "stroke-dasharray")) == 1 and study_figures.color_name(8) == study_figures.color_name(0)
    assert TOKENS_PER_STEP * STEPS == variants[0].runs[0].tokens
