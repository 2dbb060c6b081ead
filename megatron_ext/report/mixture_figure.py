"""The picture of a mixture law: losses and what the law says of them, and the critical share against tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from megatron_ext.atomic_io import atomic_open
from megatron_ext.report import formats
from megatron_ext.report.mixture_law import Law, Points

_MOST_CURVES = 5


@dataclass(frozen=True)
class Prediction:
    """The critical share after some tokens, and its interval."""

    tokens: float
    share: float
    interval: tuple[float, float]


def save_mixture_figure(
    path: Path, laws: dict[str, tuple[Law, Points]], bound: float, predictions: Sequence[Prediction], confidence: float
) -> None:
    """Write a PNG.

    Args:
        path: name of the file.
        laws: of the ``general`` and the ``domain`` loss, with the losses that they were fitted to.
        bound: largest general loss that is accepted, nats per token.
        predictions: by increasing tokens; the last is the one that was asked for.
        confidence: of their intervals.
    """
    figure = Figure(figsize=(13, 4.2), dpi=110, layout="constrained")
    for axes, (kind, (law, points)) in zip(figure.subplots(1, 3)[:2], laws.items(), strict=True):
        _draw_losses(axes, law, points)
        axes.set_title(f"{kind.capitalize()} loss")
    left, _, right = figure.axes
    left.axhline(bound, color="black", linewidth=1, linestyle="--")
    left.text(0.01, bound, f"accepted {bound:.3f}", va="bottom", fontsize=8, transform=left.get_yaxis_transform())
    _draw_critical(right, predictions, confidence)
    with atomic_open(path, "wb") as file:
        figure.savefig(file, format="png")


def _draw_losses(axes: Axes, law: Law, points: Points) -> None:
    """Losses over the share as points, and the law as curves, one colour for each number of tokens."""
    counts = np.unique(points.tokens)
    shown = counts[np.unique(np.linspace(0, len(counts) - 1, _MOST_CURVES).round().astype(int))]
    shares = np.linspace(max(0.0, points.share.min() - 0.05), min(1.0, points.share.max() + 0.05), 200)
    if "B" not in law.form.names:
        shares = np.maximum(shares, points.share.min() / 2)
    for number, tokens in enumerate(shown):
        color = colormaps["viridis"](0.9 * number / max(1, len(shown) - 1))
        axes.plot(shares, law.loss(shares, tokens), color=color, linewidth=1.5, label=f"{formats.count(float(tokens))} tokens")
        mine = points.tokens == tokens
        axes.plot(points.share[mine], points.loss[mine], color=color, marker="o", markersize=4, linestyle="none")
    axes.set_xlabel("share of domain data")
    axes.set_ylabel("nats per token")
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.3)


def _draw_critical(axes: Axes, predictions: Sequence[Prediction], confidence: float) -> None:
    tokens = [each.tokens for each in predictions]
    low, high = zip(*(each.interval for each in predictions), strict=True)
    axes.fill_between(tokens, low, high, alpha=0.2, color="tab:blue", linewidth=0, label=f"{confidence:.0%} interval")
    axes.plot(tokens, [each.share for each in predictions], color="tab:blue")
    last = predictions[-1]
    axes.plot([last.tokens], [last.share], color="tab:blue", marker="o", clip_on=False)
    axes.annotate(f"{last.share:.3f}", (last.tokens, last.share), xytext=(-6, 8), textcoords="offset points", ha="right")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: formats.count(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, 1)
    axes.set_xlabel("training tokens")
    axes.set_title("Critical share of domain data")
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    axes.grid(alpha=0.3)
