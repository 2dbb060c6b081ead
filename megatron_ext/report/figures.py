"""The figures of a report. Each is drawn from a list of phases and comes back as inline SVG with a title and a caption."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, PercentFormatter

from megatron_ext.report import bad_steps, canvas, formats
from megatron_ext.report.canvas import Label, series_color, stand_in
from megatron_ext.report.phase_axes import HALF, NARROW, WIDE, Figure, curve_of_steps, finish_token_axis, has, plot_column
from megatron_ext.report.summary import Phase, SourceResult, chain_of, evaluations, results, source_names, source_order


def forgetting_curve(phases: Sequence[Phase]) -> Figure | None:
    """Validation loss of each source over the tokens of all phases, or None where nothing was evaluated."""
    if not any(phase.run.evals for phase in phases):
        return None
    title = "Validation loss by source"
    caption = "Nats per token."
    if any(phase.run.unigram_entropy for phase in phases):
        caption += " Dotted: unigram entropy, the loss of a model that knows only how frequent each token is."
    if any(phase.is_control for phase in phases):
        caption += " Dashed: control run."
    drawings = []
    for css_class, width, height in (("wide", WIDE, 420), ("narrow", NARROW, 360)):
        figure, (axes,) = canvas.new_figure(width, height)
        _draw_forgetting(axes, phases)
        drawings.append(canvas.to_svg(figure, f"forgetting-{css_class}", f"{title}. {caption}", css_class))
    return Figure(title, caption, "".join(drawings))


def _draw_forgetting(axes: Axes, phases: Sequence[Phase]) -> None:
    colors, names = _colors(phases), source_names(phases)
    labels: dict[tuple[str, str, str], Label] = {}
    for phase in phases:
        for (source, split), curve in evaluations(phase.run.evals).items():
            tokens, losses = [phase.offset + record.tokens for record in curve], [record.loss for record in curve]
            marker = "o" if len(curve) < 40 else None
            axes.plot(tokens, losses, color=colors[source], linewidth=2, marker=marker, markersize=4, dashes=_dashes(phase), clip_on=False)
            control = phase.label if phase.is_control else ""
            text = f"{names[source, split]} {losses[-1]:.2f}" + (f"\n{control}" if control else "")
            labels[source, split, control] = Label(losses[-1], text, colors[source])
    finish_token_axis(axes, phases)
    _draw_entropies(axes, phases, {source for source, _, _ in labels})
    canvas.label_ends(axes, list(labels.values()))


def _draw_entropies(axes: Axes, phases: Sequence[Phase], sources: set[str]) -> None:
    entropies = {source: value for phase in phases for source, value in phase.run.unigram_entropy.items() if source in sources}
    colors = _colors(phases)
    top = max([axes.get_ylim()[1], *(value * 1.03 for value in entropies.values())])
    axes.set_ylim(top=top)
    for source, value in entropies.items():
        axes.axhline(value, color=colors[source], linewidth=1.5, linestyle=":")
    canvas.label_levels(axes, [Label(value, f"{source} unigram {value:.2f}", colors[source]) for source, value in entropies.items()])


def forgetting_in_percent(phases: Sequence[Phase]) -> Figure | None:
    """Change of each loss since the last phase began, or None where no source was learned before."""
    rows = [row for row in results(phases) if row.change is not None and row.phase.offset == _last(phases).offset]
    if not any(row.is_earlier for row in rows):
        return None
    figure, (axes,) = canvas.new_figure(HALF, 270)
    labels = []
    for row in rows:
        curve = evaluations(row.phase.run.evals)[row.source, row.split]
        changes = np.array([100 * (record.loss / curve[0].loss - 1) for record in curve])
        color = _colors(phases)[row.source]
        axes.plot([record.tokens for record in curve], changes, color=color, linewidth=2, dashes=_dashes(row.phase))
        labels.append(Label(changes[-1], _change_label(row), color))
    axes.axhline(0, color=stand_in("muted"), linewidth=1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g} %" if value else "0"))
    canvas.token_axis(axes, 0, max(row.phase.run.tokens for row in rows), "training tokens of the phase")
    canvas.label_ends(axes, labels)
    title = f"Learning and forgetting in {_last(phases).label}"
    caption = "Change of the validation loss since the phase began. Above zero is forgetting."
    return Figure(title, caption, canvas.to_svg(figure, "change", f"{title}. {caption}"))


def _change_label(row: SourceResult) -> str:
    change = formats.percent(row.change).replace("-", "\u2212")
    return f"{row.name} {change}" + (f"\n{row.phase.label}" if row.phase.is_control else "")


def training_loss(phases: Sequence[Phase]) -> Figure | None:
    """Loss of each source on the training documents: each step faint, a moving average strong."""
    curves = []
    for source in source_order(phases):
        for phase in chain_of(phases):
            steps = [record for record in phase.run.train if source in record.loss_by_source]
            tokens = np.array([phase.offset + record.tokens for record in steps], dtype=np.float64)
            losses = np.array([record.loss_by_source[source] for record in steps])
            seen = np.array([record.tokens_by_source.get(source, record.tokens) for record in steps], dtype=np.float64)
            if steps:
                curves.append((source, tokens, losses, canvas.smooth(losses, np.diff(seen, prepend=0.0))))
    if not curves:
        return None
    figure, (axes,) = canvas.new_figure(HALF, 250)
    colors, labels = _colors(phases), {}
    for source, tokens, losses, smoothed in curves:
        axes.plot(*canvas.thin(tokens, losses), color=colors[source], linewidth=0.8, alpha=0.35)
        axes.plot(*canvas.thin(tokens, smoothed), color=colors[source], linewidth=2, marker="o" if len(tokens) == 1 else None)
        labels[source] = Label(smoothed[-1], f"{source} {smoothed[-1]:.2f}", colors[source])
    marks = bad_steps.mark(axes, phases)
    finish_token_axis(axes, phases)
    canvas.label_ends(axes, list(labels.values()))
    title, caption = "Training loss by source", f"Nats per token, on the documents of each step. {marks}".strip()
    return Figure(title, caption, canvas.to_svg(figure, "training-loss", f"{title}. {caption}"))


def learning_rate(phases: Sequence[Phase]) -> Figure | None:
    """Learning rate of each step."""
    return curve_of_steps(
        phases, "lr", "Learning rate", "Base rate times the schedule, warm-up included.", lambda value, _: formats.learning_rate(value)
    )


def throughput(phases: Sequence[Phase]) -> Figure | None:
    """Tokens a second over all ranks."""
    return curve_of_steps(
        phases, "tokens_per_second", "Throughput", "Training tokens per second, all ranks together.", lambda value, _: formats.count(value)
    )


def step_time(phases: Sequence[Phase]) -> Figure | None:
    """Seconds of each step."""
    return curve_of_steps(phases, "step_seconds", "Step time", "Seconds per optimizer step.", lambda value, _: f"{value:g} s")


def pack_fill(phases: Sequence[Phase]) -> Figure | None:
    """Share of the token budget of a step's packs that holds documents."""
    return curve_of_steps(
        phases, "pack_fill", "Pack fill", "Share of the packs' token budget that holds documents.", PercentFormatter(1.0, symbol=" %")
    )


def gradient_norm(phases: Sequence[Phase]) -> Figure | None:
    """Global gradient norm before clipping on a logarithmic axis, skipped steps marked."""
    if not has(phases, "grad_norm"):
        return None
    figure, (axes,) = canvas.new_figure(HALF, 220)
    axes.set_yscale("log")
    plot_column(axes, phases, "grad_norm")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(_sparse_minor_tick))
    marks = bad_steps.mark(axes, phases) or "No step was skipped."
    finish_token_axis(axes, phases)
    title, caption = "Gradient norm", f"Global norm before clipping, logarithmic. {marks}"
    return Figure(title, caption, canvas.to_svg(figure, "grad-norm", f"{title}. {caption}"))


def _sparse_minor_tick(value: float, _: int) -> str:
    """Labels at 2 and 5 of each decade only."""
    return f"{value:g}" if round(value / 10 ** math.floor(math.log10(value))) in (2, 5) else ""


def document_lengths(phases: Sequence[Phase]) -> Figure | None:
    """Distribution of document lengths in powers of two, one row a phase."""
    histograms = [(phase.label, phase.run.length_histogram) for phase in chain_of(phases) if phase.run.length_histogram]
    if not histograms:
        return None
    figure, rows = canvas.new_figure(HALF, 60 + 150 * len(histograms), rows=len(histograms))
    exponents = [int(math.log2(key)) for _, histogram in histograms for key in histogram]
    edges = np.arange(min(exponents) - 1, max(exponents) + 1)
    for axes, (label, histogram) in zip(rows, histograms, strict=True):
        counts = np.array([histogram.get(2 ** int(edge + 1), 0) for edge in edges[:-1]], dtype=np.float64)
        axes.bar(edges[:-1], counts / counts.sum(), width=0.94, align="edge", color=series_color(0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        name = f"{label}: {formats.count(counts.sum())} documents"
        canvas.write(axes, 0, 1.04, name, stand_in("ink"), transform=axes.transAxes, va="bottom")
    rows[-1].set_xticks(edges, [f"{2**edge:g}" if edge < 10 else f"{2 ** (edge - 10):g}k" for edge in edges.tolist()])
    rows[-1].set_xlabel("tokens", fontsize=11, color=stand_in("muted"))
    title, caption = "Document lengths", "Share of documents, or of pieces of cut documents, by length in tokens."
    return Figure(title, caption, canvas.to_svg(figure, "lengths", f"{title}. {caption}"))


def all_figures(phases: Sequence[Phase]) -> list[Figure]:
    """Every figure but the forgetting curve, without those that have nothing to show."""
    makers = (forgetting_in_percent, training_loss, learning_rate, gradient_norm, throughput, step_time, document_lengths, pack_fill)
    return [figure for maker in makers if (figure := maker(phases)) is not None]


def _last(phases: Sequence[Phase]) -> Phase:
    return chain_of(phases)[-1]


def _colors(phases: Sequence[Phase]) -> dict[str, str]:
    return {source: series_color(i) for i, source in enumerate(source_order(phases))}


def _dashes(phase: Phase) -> tuple[float, ...]:
    return (4, 2) if phase.is_control else ()
