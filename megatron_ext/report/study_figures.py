"""The figures of a study. Each is drawn from a list of variants, one colour a variant, the spread over seeds as a band."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from megatron_ext.report import canvas, formats
from megatron_ext.report.canvas import SERIES, Label, series_color, stand_in
from megatron_ext.report.metrics import Run
from megatron_ext.report.phase_axes import HALF, NARROW, WIDE, Figure
from megatron_ext.report.study import Curve, Variant, differences, diverged, stacked, validation_curve, validation_loss
from megatron_ext.report.study_table import percent

_BEGINNING = 0.125
"""Share of the tokens whose losses may lie above the axes: they fall by far more than the variants differ."""


def color_name(index: int) -> str:
    """The page's colour of the variant at ``index``."""
    return f"series-{index % SERIES}"


def validation_figure(variants: Sequence[Variant]) -> Figure:
    """Validation loss against tokens."""
    curves = [stacked([validation_curve(run) for run in variant.runs]) for variant in variants]
    begins = f" Before the first step the loss is {formats.loss(float(np.mean(curves[0].losses[:, 0])))}."
    caption = f"Nats per token: mean over seeds, the band from the lowest to the highest.{begins} The axis leaves out the steep beginning."
    return _wide_and_narrow("Validation loss", caption, "study-validation", variants, curves)


def difference_figure(variants: Sequence[Variant]) -> Figure | None:
    """Validation loss relative to the first variant, against tokens; None where there is only one."""
    if len(variants) == 1:
        return None
    curves = [differences(variant, variants[0]) for variant in variants]
    title = f"Validation loss relative to {variants[0].name}"
    caption = "Of runs with the same seed, in percent: mean over seeds, the band from the lowest to the highest. Below zero is better."
    return _wide_and_narrow(title, caption, "study-difference", variants, curves, in_percent=True)


def _wide_and_narrow(
    title: str, caption: str, name: str, variants: Sequence[Variant], curves: Sequence[Curve], in_percent: bool = False
) -> Figure:
    drawings = []
    for css_class, width, height in (("wide", WIDE, 380), ("narrow", NARROW, 340)):
        figure, (axes,) = canvas.new_figure(width, height)
        _draw(axes, variants, curves, in_percent)
        if in_percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g} %" if value else "0"))
        canvas.token_axis(axes, 0, max(curve.tokens[-1] for curve in curves), "training tokens")
        drawings.append(canvas.to_svg(figure, f"{name}-{css_class}", f"{title}. {caption}", css_class))
    return Figure(title, caption, "".join(drawings))


def _draw(axes: Axes, variants: Sequence[Variant], curves: Sequence[Curve], in_percent: bool = False) -> None:
    """Every variant's mean, band and name; in percent the first is zero and has no number."""
    labels, shown = [], []
    for index, (variant, curve) in enumerate(zip(variants, curves, strict=True)):
        mean = _draw_curve(axes, index, curve.tokens, curve.losses)
        number = formats.loss(mean[-1]) if not in_percent else _percent(mean[-1]) if index else ""
        labels.append(Label(mean[-1], f"{variant.name} {number}".rstrip(), series_color(index)))
        shown.append(curve.losses[:, curve.tokens >= _BEGINNING * curve.tokens[-1]])
    _limit(axes, shown)
    canvas.label_ends(axes, labels)


def _draw_curve(axes: Axes, index: int, x: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """A mean and its band, clipped by the axes; returns the mean, float64 [points]."""
    mean, color = losses.mean(axis=0), series_color(index)
    axes.fill_between(x, losses.min(axis=0), losses.max(axis=0), color=color, alpha=0.18, linewidth=0)
    axes.plot(x, mean, color=color, linewidth=2, dashes=(4, 2) if index >= SERIES else ())
    return mean


def _limit(axes: Axes, shown: Sequence[np.ndarray]) -> None:
    """Limits of y from the values that must be seen, without those far above most others: of runs that diverged."""
    values = np.concatenate([each.ravel() for each in shown])
    values = values[np.isfinite(values)]
    if not len(values):
        return
    low, middle, high = values.min(), np.median(values), values.max()
    high = min(high, middle + 4 * (middle - low)) if middle > low else high
    margin = 0.04 * (high - low) or 0.5
    axes.set_ylim(low - margin, high + margin)


def training_figure(variants: Sequence[Variant]) -> Figure:
    """Moving average of the training loss against tokens."""
    curves = []
    for variant in variants:
        smoothed = []
        for run in variant.runs:
            tokens = run.column("tokens")
            smoothed.append(Curve(tokens, canvas.smooth(run.column("loss"), np.diff(tokens, prepend=0.0))))
        every = max(1, len(smoothed[0].tokens) // 400)
        curves.append(stacked([Curve(curve.tokens[::-every][::-1], curve.losses[::-every][::-1]) for curve in smoothed]))
    figure, (axes,) = canvas.new_figure(HALF, 270)
    _draw(axes, variants, curves)
    canvas.token_axis(axes, 0, max(curve.tokens[-1] for curve in curves), "training tokens")
    title, caption = "Training loss", "Nats per token, moving average over a fiftieth of the steps; mean and band over seeds."
    return Figure(title, caption, canvas.to_svg(figure, "study-training", f"{title}. {caption}"))


def time_figure(variants: Sequence[Variant]) -> Figure:
    """Validation loss against the seconds of the steps before it."""
    figure, (axes,) = canvas.new_figure(HALF, 270)
    labels, shown, longest = [], [], 0.0
    for index, variant in enumerate(variants):
        curve = stacked([validation_curve(run) for run in variant.runs])
        seconds = np.mean([_seconds_at_evaluations(run) for run in variant.runs], axis=0)
        mean = _draw_curve(axes, index, seconds, curve.losses)
        labels.append(Label(mean[-1], variant.name, series_color(index)))
        shown.append(curve.losses[:, curve.tokens >= _BEGINNING * curve.tokens[-1]])
        longest = max(longest, float(seconds[-1]))
    _limit(axes, shown)
    canvas.seconds_axis(axes, 0, longest, "seconds of training steps")
    canvas.label_ends(axes, labels)
    title, caption = (
        "Validation loss over time",
        "Nats per token against the seconds of all steps so far, evaluations and checkpoints left out.",
    )
    return Figure(title, caption, canvas.to_svg(figure, "study-time", f"{title}. {caption}"))


def _seconds_at_evaluations(run: Run) -> np.ndarray:
    """Sum of the seconds of the steps before each evaluation, float64 [evaluations]."""
    steps = np.concatenate([[0.0], run.column("step")])
    seconds = np.concatenate([[0.0], np.cumsum(run.column("step_seconds"))])
    return np.interp(sorted({record.step for record in run.evals}), steps, seconds)


def sweep_figures(variants: Sequence[Variant]) -> list[Figure]:
    """Final loss over the swept value, one figure for all keys with the same last name, such as lr."""
    names = dict.fromkeys(variant.key.split(".")[-1] for variant in variants if variant.key)
    return [_sweep_figure(variants, name) for name in names]


def _sweep_figure(variants: Sequence[Variant], name: str) -> Figure:
    figure, (axes,) = canvas.new_figure(HALF, 270)
    swept = [(index, variant) for index, variant in enumerate(variants) if variant.key and variant.key.split(".")[-1] == name]
    values = sorted({value for _, variant in swept for value in variant.sweep})
    labels, shown = [], []
    for index, variant in swept:
        losses = {value: validation_loss(run) for value, run in variant.sweep.items()}
        shown.append(np.array([losses[value] for value, run in variant.sweep.items() if not diverged(run)]))
        _draw_sweep(axes, index, variant, losses)
        labels.append(Label(losses[variant.best], f"{variant.name} {losses[variant.best]:.3f}", series_color(index)))
    _limit(axes, shown)
    _value_axis(axes, values, name)
    canvas.label_ends(axes, labels)
    title = f"Final validation loss over {name}"
    keys = ", ".join(dict.fromkeys(variant.key for _, variant in swept))
    caption = f"Nats per token at the first seed, over {keys}. Filled: the best, with its loss at the right. Crosses: diverged."
    return Figure(title, caption, canvas.to_svg(figure, f"study-sweep-{name}", f"{title}. {caption}"))


def _draw_sweep(axes: Axes, index: int, variant: Variant, losses: dict[float, float]) -> None:
    color = series_color(index)
    good = [value for value, run in variant.sweep.items() if not diverged(run)]
    axes.plot(good, [losses[value] for value in good], color=color, linewidth=1.5, marker="o", markersize=5, markerfacecolor="none")
    axes.plot([variant.best], [losses[variant.best]], color=color, marker="o", markersize=7, clip_on=False, zorder=5)
    bad = [value for value in variant.sweep if value not in good]
    at_top = {"transform": axes.get_xaxis_transform(), "clip_on": False}
    axes.plot(bad, [1.0 - 0.04 * index] * len(bad), color=color, linestyle="none", marker="x", markersize=7, markeredgewidth=2, **at_top)


def _value_axis(axes: Axes, values: Sequence[float], name: str) -> None:
    """Logarithmic where all values allow it, with a tick at each of them unless they stand too close."""
    logarithmic = values[0] > 0
    places = [math.log(value) if logarithmic else value for value in values]
    least = (places[-1] - places[0]) / 8
    ticks: list[int] = []
    for index, place in enumerate(places):
        if not ticks or place - places[ticks[-1]] >= least:
            ticks.append(index)
    if logarithmic:
        axes.set_xscale("log")
    axes.set_xticks([values[index] for index in ticks], [formats.learning_rate(values[index]) for index in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="major", length=4, color=stand_in("muted"))
    axes.set_xlabel(name, fontsize=11, color=stand_in("muted"))
    axes.margins(x=0.06)


def _percent(value: float) -> str:
    return percent(value).replace("-", "\u2212")
