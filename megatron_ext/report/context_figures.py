"""The figures of what context is worth: loss by position in the document, and needles found by length and depth."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from megatron_ext.report import canvas, formats
from megatron_ext.report.canvas import Label, series_color, stand_in
from megatron_ext.report.phase_axes import HALF, Figure, finish_token_axis
from megatron_ext.report.records import EvalRecord, NeedleRecord
from megatron_ext.report.shades import LEVELS, Scale, paint
from megatron_ext.report.summary import Phase, chain_of, evaluations, source_names, source_order

_ROW = 26
"""Height of a row of a map, in CSS pixels."""
_AROUND = 76
"""What stands over and under the rows."""


def all_figures(phases: Sequence[Phase]) -> list[Figure]:
    """Those that have something to show."""
    found = [_loss_by_position(phases), *_needle_maps(phases), _needles_over_tokens(phases)]
    return [figure for figure in found if figure is not None]


def _loss_by_position(phases: Sequence[Phase]) -> Figure | None:
    """Loss of each source by bucket, at the last evaluation and at the first of its phase."""
    phase = next((each for each in reversed(chain_of(phases)) if any(len(record.by_position) > 1 for record in each.run.evals)), None)
    if phase is None:
        return None
    curves = {key: curve for key, curve in evaluations(phase.run.evals).items() if curve[-1].by_position}
    starts = sorted({bucket["start"] for curve in curves.values() for bucket in curve[-1].by_position})
    figure, (axes,) = canvas.new_figure(HALF, 270)
    names, order, labels = source_names(phases), source_order(phases), []
    for (source, split), curve in curves.items():
        color = series_color(order.index(source))
        _draw_buckets(axes, curve[0], starts, color, 1, (4, 2))
        last = _draw_buckets(axes, curve[-1], starts, color, 2, ())
        labels.append(Label(last, f"{names[source, split]} {last:.2f}", color))
    _name_buckets(axes, starts)
    canvas.label_ends(axes, labels)
    title = f"Loss by position in {phase.label}"
    caption = "Nats per token of the validation sets, by how many tokens of the document stand before. Dashed: when the phase began."
    return Figure(title, caption, canvas.to_svg(figure, "loss-by-position", f"{title}. {caption}"))


def _draw_buckets(axes: Axes, record: EvalRecord, starts: Sequence[float], color: str, width: int, dashes: tuple[int, ...]) -> float:
    """One evaluation, a point a bucket; returns the loss of the last bucket that has one."""
    losses = {bucket["start"]: bucket["loss"] for bucket in record.by_position}
    places = [place for place, start in enumerate(starts) if start in losses]
    values = [losses[starts[place]] for place in places]
    axes.plot(places, values, color=color, linewidth=width, dashes=dashes, marker="o", markersize=4, clip_on=False)
    return values[-1] if values else math.nan


def _name_buckets(axes: Axes, starts: Sequence[float]) -> None:
    """A tick for each bucket, by the position that it begins at."""
    axes.set_xlim(-0.3, max(1, len(starts) - 1) + 0.1)
    axes.set_xticks(range(len(starts)), [_tokens(start) for start in starts])
    axes.set_xlabel("first position of the bucket", fontsize=11, color=stand_in("muted"))


def _needle_maps(phases: Sequence[Phase]) -> list[Figure]:
    """What was found at the last evaluation, in two maps of length by depth."""
    asked = [(phase, phase.run.needles[-1]) for phase in chain_of(phases) if phase.run.needles]
    if not asked:
        return []
    phase, record = asked[-1]
    when = f"After {formats.count(record.tokens)} tokens of {phase.label}; {record.samples} documents in each cell."
    exact = f"Share of hidden values that the model answers word by word, by the length of the document and the depth of the value. {when}"
    likely = f"Mean log-probability of the tokens of hidden values, in nats. {when}"
    lowest = min((value for row in record.log_probability for value in row if math.isfinite(value)), default=0.0)
    return [
        _needle_map("Needles found", exact, "needle-exact", record, record.exact, Scale(0.0, 1.0, False), "{:.0%}"),
        _needle_map(
            "Likelihood of needles", likely, "needle-likelihood", record, record.log_probability, Scale(lowest, 0.0, False), "{:.2f}"
        ),
    ]


def _needle_map(title: str, caption: str, name: str, record: NeedleRecord, values: list[list[float]], scale: Scale, form: str) -> Figure:
    """A row a length, the shortest at the bottom, and a column a depth."""
    figure, (axes,) = canvas.new_figure(HALF, _AROUND + _ROW * len(record.lengths))
    axes.grid(False)
    shades = scale.shades(np.array(values, dtype=np.float64))
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if math.isfinite(value):
                paint(axes, np.array([[column - 0.5, column + 0.5, row - 0.5, row + 0.5]]), shades[row, column])
            color = stand_in("surface" if shades[row, column] >= LEVELS / 2 else "ink")
            text = form.format(value) if math.isfinite(value) else "n/a"
            canvas.write(axes, column, row, text.replace("-", "\u2212"), color, ha="center", va="center")
    axes.set_xlim(-0.5, len(record.depths) - 0.5)
    axes.set_ylim(-0.5, len(record.lengths) - 0.5)
    axes.set_xticks(range(len(record.depths)), [f"{depth:.0%}" for depth in record.depths])
    axes.set_yticks(range(len(record.lengths)), [_tokens(length) for length in record.lengths])
    axes.set_xlabel("depth: share of the text before the needle", fontsize=11, color=stand_in("muted"))
    return Figure(title, caption, canvas.to_svg(figure, name, f"{title}. {caption}"))


def _needles_over_tokens(phases: Sequence[Phase]) -> Figure | None:
    """Share found of each length, the mean over depths, where needles were asked for more than once."""
    lengths = sorted({length for phase in chain_of(phases) for record in phase.run.needles for length in record.lengths})
    if not any(len(phase.run.needles) > 1 for phase in chain_of(phases)):
        return None
    figure, (axes,) = canvas.new_figure(HALF, 270)
    labels: dict[int, Label] = {}
    for number, length in enumerate(lengths):
        for phase in chain_of(phases):
            records = [record for record in phase.run.needles if length in record.lengths]
            shares = [float(np.mean(record.exact[record.lengths.index(length)])) for record in records]
            tokens = [phase.offset + record.tokens for record in records]
            axes.plot(tokens, shares, color=series_color(number), linewidth=2, marker="o", markersize=3, clip_on=False)
            if shares:
                labels[length] = Label(shares[-1], f"{_tokens(length)} {shares[-1]:.0%}", series_color(number))
    finish_token_axis(axes, phases)
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    canvas.label_ends(axes, list(labels.values()))
    title, caption = "Needles found over training", "By the length of the document, mean over depths."
    return Figure(title, caption, canvas.to_svg(figure, "needles", f"{title}. {caption}"))


def _tokens(number: float) -> str:
    """A number of tokens in powers of two where it is one: ``4k``."""
    whole = int(number)
    return f"{whole // 1024}k" if whole and whole % 1024 == 0 else f"{whole:,}"
