"""One self-contained HTML page about a study."""

from collections.abc import Sequence
from pathlib import Path

from megatron_ext.atomic_io import atomic_open
from megatron_ext.report import formats, study_figures
from megatron_ext.report.html import Html, element, number_cell, table
from megatron_ext.report.layout import document, figure_element, swatch
from megatron_ext.report.study import (
    Variant,
    diverged,
    headline,
    named_runs,
    results,
    training_loss,
    validation_loss,
    warnings,
)
from megatron_ext.report.study_table import cells, column_names


def write_study(title: str, variants: Sequence[Variant], output: str | Path) -> None:
    """Write the page; ``variants`` hold finished runs, the same seeds each, and the first is what the others are compared with.

    Raises:
        DataError: a run was never evaluated.
    """
    text = render_study(title, variants)
    with atomic_open(output) as file:
        file.write(text)


def render_study(title: str, variants: Sequence[Variant]) -> str:
    """The page as text."""
    sweeps = [figure_element(figure) for figure in study_figures.sweep_figures(variants)]
    difference = study_figures.difference_figure(variants)
    chosen = " The best value was chosen by the final validation loss at the first seed, which is one of the seeds below."
    return document(
        f"{title} \u00b7 study",
        element("header", element("h1", title), element("p", _when_and_where(variants), class_="muted")),
        element("p", headline(variants).replace(" -", " \u2212").replace("(-", "(\u2212"), class_="headline"),
        *(element("p", text, class_="warning") for text in warnings(variants)),
        element("h2", "Each variant at its best"),
        element("p", f"{_what_is_shown(variants)}{chosen if sweeps else ''}", class_="muted"),
        _results_table(variants),
        element("h2", "How the loss moved"),
        figure_element(study_figures.validation_figure(variants)),
        *([figure_element(difference)] if difference else []),
        element("h2", "What was swept, and what it cost"),
        element(
            "div",
            *sweeps,
            figure_element(study_figures.time_figure(variants)),
            figure_element(study_figures.training_figure(variants)),
            class_="grid",
        ),
        element("h2", "Every run"),
        _runs_table(variants),
        *(_details(variant) for variant in variants),
    )


def _what_is_shown(variants: Sequence[Variant]) -> str:
    seeds = [str(seed) for seed in variants[0].seeds]
    over = f"over seeds {', '.join(seeds)}, with the lowest and the highest" if len(seeds) > 1 else f"of seed {seeds[0]}"
    training = "Training loss is that of the last tenth of the tokens"
    times = f"times are medians over steps and those of whole runs, relative to {variants[0].name} at the same seed"
    return f"Losses in nats per token, means {over}. {training}; {times}."


def _when_and_where(variants: Sequence[Variant]) -> str:
    run = variants[0].runs[0]
    start = run.starts[-1]
    corpora = ", ".join(dict.fromkeys(record.source for record in run.evals))
    parts = [
        formats.moment(run.starts[0].time),
        f"{start.ranks} {'rank' if start.ranks == 1 else 'ranks'} on {start.device or 'unknown device'}",
        f"{formats.count(start.parameters)} parameters",
        f"{formats.count(run.tokens)} tokens a run",
        f"validated on {corpora}",
        start.dtype,
    ]
    return " \u00b7 ".join(part for part in parts if part)


def _results_table(variants: Sequence[Variant]) -> Html:
    """Losses, difference and times of each variant, over seeds."""
    header = [("variant", False), *((name, True) for name in column_names(variants)), ("setting", False)]
    body = []
    for index, row in enumerate(results(variants)):
        name = element("td", swatch(study_figures.color_name(index)), row.variant.name)
        body.append(element("tr", name, *(_spread_cell(*cell) for cell in cells(row)), element("td", row.variant.setting)))
    return table(header, body)


def _spread_cell(mean: str, over_seeds: str) -> Html:
    """A mean with the lowest and highest below it."""
    minus = "\u2212"
    below = [element("div", over_seeds.replace("-", minus), class_="muted")] if over_seeds else []
    return element("td", mean.replace("-", minus), *below, class_="number")


def _runs_table(variants: Sequence[Variant]) -> Html:
    header = [("run", False), ("validation loss", True), ("training loss", True), ("steps", True), ("time", True), ("", False)]
    rows = []
    for index, variant in enumerate(variants):
        for number, (name, run) in enumerate(named_runs(variant)):
            marks = ["best of the sweep"] * (variant.best is not None and run is variant.sweep[variant.best])
            marks += ["diverged"] * diverged(run)
            numbers = (formats.loss(validation_loss(run)), formats.loss(training_loss(run)), str(run.train[-1].step))
            cells = [element("td", swatch(study_figures.color_name(index)), name), *map(number_cell, numbers)]
            cells += [number_cell(formats.duration(run.seconds)), element("td", ", ".join(marks))]
            rows.append(element("tr", *cells, class_="" if number else "new-phase"))
    return table(header, rows)


def _details(variant: Variant) -> Html:
    run = variant.runs[0]
    versions = ", ".join(f"{name} {version}" for name, version in run.starts[-1].versions.items())
    return element(
        "details",
        element("summary", f"Command of {variant.name}"),
        element("p", f"{run.directory} \u00b7 {versions}", class_="muted"),
        element("pre", variant.command),
    )
