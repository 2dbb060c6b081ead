"""One self-contained HTML page about a study."""

from collections.abc import Iterator, Sequence
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
    training_loss,
    validation_loss,
    warnings,
)
from megatron_ext.report.study_averaging import averaging_table
from megatron_ext.report.study_forgetting import forgetting_table
from megatron_ext.report.study_inside import SPIKE, SPIKE_WINDOW, has_probes, inside_table
from megatron_ext.report.study_inside_figures import depth_figures, kurtosis_figure
from megatron_ext.report.study_positions import positions_table
from megatron_ext.report.study_quantization import quantization_table
from megatron_ext.report.study_table import Table, results_table


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
        _table(variants, results_table(variants), settings=True),
        *_sections(variants),
        element("h2", "How the loss moved"),
        figure_element(study_figures.validation_figure(variants)),
        *([figure_element(difference)] if difference else []),
        *_inside(variants),
        element("h2", "What was swept, and what it cost" if sweeps else "What it cost"),
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


def _sections(variants: Sequence[Variant]) -> Iterator[Html]:
    """Tables that only some studies have."""
    of_sources = "Last loss of each validation source in nats per token"
    for numbers, title, words in (
        (
            forgetting_table(variants),
            "Learned and forgotten",
            f"{of_sources}, and how far it rose at the worst above that of the first model.",
        ),
        (positions_table(variants), "By position in documents", f"{of_sources}, by how many tokens of the document stand before."),
        (
            averaging_table(variants),
            "Checkpoints averaged",
            "Loss of the mean of the weights of the last checkpoints in nats per token, and how much more that is than of the last alone.",
        ),
        (
            quantization_table(variants),
            "After quantization",
            "Loss of the last checkpoint in nats per token, its weights, activations, keys and values rounded to nearest without training.",
        ),
    ):
        if numbers is not None:
            yield element("h2", title)
            yield element("p", words, class_="muted")
            yield _table(variants, numbers)


def _inside(variants: Sequence[Variant]) -> list[Html]:
    if not has_probes(variants):
        return []
    words = (
        "Excess kurtosis over the channels of a token, in brackets that of normal noise of that width; largest over smallest variance "
        "and gradient norm of the residual stream over depth; and steps whose gradient norm was more than "
        f"{SPIKE:g} times the median of the {SPIKE_WINDOW} before."
    )
    return [
        element("h2", "Inside the models"),
        element("p", words, class_="muted"),
        _table(variants, inside_table(variants)),
        figure_element(kurtosis_figure(variants)),
        element("div", *map(figure_element, depth_figures(variants)), class_="grid"),
    ]


def _table(variants: Sequence[Variant], numbers: Table, settings: bool = False) -> Html:
    """Numbers of each variant over seeds."""
    header = [("variant", False), *((name, True) for name in numbers.columns), *([("setting", False)] if settings else [])]
    body = []
    for index, (variant, row) in enumerate(zip(variants, numbers.rows, strict=True)):
        name = element("td", swatch(study_figures.color_name(index)), variant.name)
        setting = [element("td", variant.setting)] if settings else []
        body.append(element("tr", name, *(_spread_cell(*cell) for cell in row), *setting))
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
