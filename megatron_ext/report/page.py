"""One self-contained HTML page about a chain of runs: no script, nothing loaded from elsewhere."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml

from megatron_ext.atomic_io import atomic_open
from megatron_ext.report import context_figures, formats, plan_figures, probe_figures
from megatron_ext.report.bad_steps import bad_steps_section
from megatron_ext.report.canvas import SERIES
from megatron_ext.report.figures import all_figures, forgetting_curve
from megatron_ext.report.forgetting import Forgetting, forgetting, recovery, worth_telling
from megatron_ext.report.gantt import plan_timeline
from megatron_ext.report.html import Html, element, number_cell, table
from megatron_ext.report.layout import document, figure_element, swatch
from megatron_ext.report.metrics import Run
from megatron_ext.report.operation import operation
from megatron_ext.report.plans import sharing
from megatron_ext.report.summary import Phase, SourceResult, arrange, chain_of, headline, results, source_order


def write_report(runs: Sequence[Run], output: str | Path, compare: Mapping[str, Run] | None = None) -> None:
    """Write the page for ``runs`` (one after the other) and control runs (label -> run, each an alternative to the last run).

    Raises:
        DataError: there is no run.
    """
    phases = arrange(runs, compare)
    with atomic_open(output) as file:
        file.write(render(phases))


def render(phases: Sequence[Phase]) -> str:
    """The page as text."""
    title = " \u2192 ".join(phase.label for phase in chain_of(phases))
    losses = forgetting_curve(phases)
    return document(
        f"{title} \u00b7 training report",
        element("header", element("h1", title), element("p", _when_and_where(phases), class_="muted")),
        element("p", headline(phases), class_="headline"),
        _tiles(phases),
        element("h2", "How the loss moved"),
        figure_element(losses) if losses else element("p", "No source was evaluated in these runs.", class_="muted"),
        element("h2", "Each phase and source"),
        _results_table(phases),
        *_stability_gap(phases),
        *_context(phases),
        element("h2", "How training went"),
        element("p", "Where a curve is drawn twice: faint is each step, strong a moving average.", class_="muted"),
        element("div", *(figure_element(figure) for figure in all_figures(phases)), class_="grid"),
        *bad_steps_section(phases),
        *_inside(phases),
        *_sharing(phases),
        element("h2", "What ran"),
        _phases_table(phases),
        *operation(phases),
        *_notes(phases),
        *(_details(phase) for phase in phases),
    )


def _when_and_where(phases: Sequence[Phase]) -> str:
    first, last = phases[0].run.starts[0], chain_of(phases)[-1].run.starts[-1]
    parts = [
        formats.moment(first.time),
        f"{last.ranks} {'rank' if last.ranks == 1 else 'ranks'} on {last.device or 'unknown device'}",
        f"{formats.count(last.parameters)} parameters",
        last.dtype,
        f"{last.attention} attention" if last.attention else "",
    ]
    return " \u00b7 ".join(part for part in parts if part)


def _tiles(phases: Sequence[Phase]) -> Html:
    chain, shared = [phase.run for phase in chain_of(phases)], sharing(phases)
    facts = {
        "Training tokens": formats.count(sum(run.tokens for run in chain)),
        "Optimizer steps": f"{sum(len(run.train) for run in chain):,}",
        "Time": formats.duration(sum(run.seconds for run in chain)),
        "Tokens per second": formats.count(_median(chain, "tokens_per_second")),
        "Model TFLOP/s": formats.count(_median(chain, "tflops")),
        "Memory per rank": formats.number(_largest(chain, "memory_gib")) + " GiB",
        **(shared.facts if shared else {}),
    }
    tiles = [element("div", element("dt", name), element("dd", value)) for name, value in facts.items() if not value.startswith("n/a")]
    return element("dl", *tiles, class_="tiles")


def _results_table(phases: Sequence[Phase]) -> Html:
    names = ("first eval", "last eval", "change", "unigram entropy", "tokens seen", "epochs")
    rows = results(phases)
    order = source_order(phases)
    body = []
    for i in range(len(rows)):
        begins_phase = i == 0 or rows[i].phase is not rows[i - 1].phase
        body.append(_result_row(rows[i], order.index(rows[i].source), begins_phase))
    return table([("phase", False), ("source", False), *((name, True) for name in names)], body)


def _result_row(row: SourceResult, color: int, begins_phase: bool) -> Html:
    classes = ["new-phase"] * begins_phase + ["control"] * row.phase.is_control
    numbers = (
        formats.loss(row.first_loss),
        formats.loss(row.last_loss),
        formats.percent(row.change),
        formats.loss(row.unigram_entropy),
        formats.count(row.tokens),
        formats.number(row.epochs),
    )
    label = row.phase.label if begins_phase else ""
    cells = [element("td", label), element("td", swatch(f"series-{color % SERIES}"), row.name), *map(number_cell, numbers)]
    return element("tr", *cells, class_=" ".join(classes))


def _stability_gap(phases: Sequence[Phase]) -> list[Html]:
    """The section about losses that rose on the way, empty where nothing could be forgotten."""
    rows = worth_telling(forgetting(phases))
    if not rows:
        return []
    words = (
        "How far the validation loss of a source rose above its start in the phase, when it was back, and where it ended; nats per token. "
        "Old: trained on in an earlier phase, or replayed. Tokens count from the begin of the phase; evaluations lie between them."
    )
    names = ("loss at start", "worst rise", "after tokens", "recovery", "final difference")
    order = source_order(phases)
    body = [_gap_row(row, order.index(row.source), i == 0 or row.phase is not rows[i - 1].phase) for i, row in enumerate(rows)]
    header = [("phase", False), ("source", False), ("domain", False), *((name, True) for name in names)]
    return [element("h2", "What was forgotten on the way"), element("p", words, class_="muted"), table(header, body)]


def _gap_row(row: Forgetting, color: int, begins_phase: bool) -> Html:
    gap, classes = row.gap, ["new-phase"] * begins_phase + ["control"] * row.phase.is_control
    worst = (f"{gap.worst_rise:+.3f}", formats.count(gap.worst_tokens)) if gap.worst_rise else ("none", "")
    numbers = (formats.loss(gap.start), *worst, recovery(gap), f"{gap.final_difference:+.3f}")
    label = row.phase.label if begins_phase else ""
    source = element("td", swatch(f"series-{color % SERIES}"), row.name)
    return element("tr", element("td", label), source, element("td", row.domain), *map(number_cell, numbers), class_=" ".join(classes))


def _context(phases: Sequence[Phase]) -> list[Html]:
    """The section about losses by position and needles, empty where neither was evaluated."""
    figures = context_figures.all_figures(phases)
    if not figures:
        return []
    return [element("h2", "What context is worth"), element("div", *map(figure_element, figures), class_="grid")]


def _inside(phases: Sequence[Phase]) -> list[Html]:
    """The section about what probes saw, empty where no step was looked into."""
    if not probe_figures.has_probes(phases):
        return []
    words = (
        "In a map, a row is a layer, the first one at the bottom, and a column is a step that was looked into, drawn from the one before; "
        "in maps of the residual stream row 0 is the embedding. The stronger the colour, the larger the value."
    )
    return [
        element("h2", "Inside the model"),
        element("p", words, class_="muted"),
        figure_element(probe_figures.kurtosis_by_site(phases)),
        element("div", *(figure_element(figure) for figure in probe_figures.maps(phases)), class_="grid"),
    ]


def _sharing(phases: Sequence[Phase]) -> list[Html]:
    """The section about plans, empty where no rank shared a pack."""
    if sharing(phases) is None:
        return []
    words = "The degree of a pack is the number of ranks that share its documents, and so their attention, by exchanging tokens for heads."
    timeline = plan_timeline(phases)
    return [
        element("h2", "How ranks shared packs"),
        element("p", words, class_="muted"),
        *([figure_element(timeline)] if timeline else []),
        element("div", *(figure_element(figure) for figure in plan_figures.curves(phases)), class_="grid"),
    ]


def _phases_table(phases: Sequence[Phase]) -> Html:
    names = ("steps", "tokens per step", "tokens", "time", "resumes", "skipped", "checkpoints")
    rows = []
    for phase in phases:
        run, start = phase.run, phase.run.starts[-1]
        done = f"{run.train[-1].step:,} of {start.total_steps:,}" if run.train else f"0 of {start.total_steps:,}"
        resumes = sum(start.step > 0 for start in run.starts)
        checkpoints = len({event.step for event in run.events if event.event == "save"})
        numbers = (done, formats.count(start.tokens_per_step), formats.count(run.tokens), formats.duration(run.seconds))
        counters = (str(resumes), str(len(run.skipped)), str(checkpoints))
        cells = [element("td", phase.label), element("td", formats.moment(run.starts[0].time)), *map(number_cell, (*numbers, *counters))]
        rows.append(element("tr", *cells, class_="control" if phase.is_control else ""))
    return table([("phase", False), ("started", False), *((name, True) for name in names)], rows)


def _notes(phases: Sequence[Phase]) -> list[Html]:
    text = "{}: the last line of metrics.jsonl was cut off while it was written, and is left out."
    return [element("p", text.format(phase.label), class_="muted") for phase in phases if phase.run.torn]


def _details(phase: Phase) -> Html:
    versions = ", ".join(f"{name} {version}" for name, version in phase.run.starts[-1].versions.items())
    return element(
        "details",
        element("summary", f"Configuration of {phase.label}"),
        element("p", f"{phase.run.directory} \u00b7 {versions}", class_="muted"),
        element("pre", yaml.safe_dump(phase.run.config, sort_keys=False, allow_unicode=True)),
    )


def _median(runs: Sequence[Run], column: str) -> float:
    values = np.concatenate([run.column(column) for run in runs])
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else float("nan")


def _largest(runs: Sequence[Run], column: str) -> float:
    values = np.concatenate([run.column(column) for run in runs])
    return float(np.max(values[np.isfinite(values)], initial=-np.inf))
