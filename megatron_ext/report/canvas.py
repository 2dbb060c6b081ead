"""Axes that look alike, and their way into a page as inline SVG that follows the page's colours and fonts."""

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_ext.report import formats

SERIES = 8
"""Number of colours for sources; further sources begin again."""

_VARIABLES = ("ink", "muted", "grid", "surface", *(f"series-{i}" for i in range(SERIES)))
_FONT_SIZE = 11
_LINE_HEIGHT = 14
_CHARACTER_WIDTH = 6.2
_MOST_CHARACTERS = 24
_MOST_POINTS = 200


@dataclass(frozen=True)
class Label:
    """Text at the right of a curve or of a level line, at the height of its (last) value."""

    value: float
    text: str
    color: str


def stand_in(variable: str) -> str:
    """A colour that ``to_svg`` replaces with the page's CSS variable of that name."""
    return f"#fe01{_VARIABLES.index(variable):02x}"


def series_color(index: int) -> str:
    """Colour of the source at ``index`` in the order of sources."""
    return stand_in(f"series-{index % SERIES}")


def new_figure(width: int, height: int, *, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of ``rows`` axes below each other; sizes in CSS pixels."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    grid = figure.subplots(rows, 1, sharex=True, squeeze=False)
    figure.subplots_adjust(left=52 / width, right=1 - 20 / width, top=1 - 16 / height, bottom=42 / height, hspace=0.35)
    for axes in grid[:, 0]:
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(stand_in("muted"))
        axes.grid(axis="y", color=stand_in("grid"), linewidth=1)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", length=0, labelsize=_FONT_SIZE, labelcolor=stand_in("muted"))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=max(3, height // (45 * rows)), steps=[1, 2, 2.5, 5, 10]))
    return figure, list(grid[:, 0])


def token_axis(axes: Axes, begin: float, end: float, label: str) -> None:
    """Make x an axis of tokens from ``begin`` to ``end``."""
    _number_axis(axes, begin, end, label)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: formats.count(value)))


def seconds_axis(axes: Axes, begin: float, end: float, label: str) -> None:
    """Make x an axis of seconds from ``begin`` to ``end``."""
    _number_axis(axes, begin, end, label)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _number_axis(axes: Axes, begin: float, end: float, label: str) -> None:
    axes.set_xlim(begin, end if end > begin else begin + 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.tick_params(axis="x", length=4, color=stand_in("muted"))
    axes.set_xlabel(label, fontsize=_FONT_SIZE, color=stand_in("muted"))


def write(axes: Axes, x: float, y: float, text: str, color: str, **placement: object) -> None:
    """Put plain text into ``axes``: names come from users, so that $ and _ are not mathematics."""
    axes.text(x, y, text, color=color, fontsize=_FONT_SIZE, parse_math=False, **placement)


def label_ends(axes: Axes, labels: Sequence[Label]) -> None:
    """Write each label right of the axes at the height of its value, moved as little as needed to keep them apart.

    Makes room for the longest line of text, so call it when the limits of y are final.
    """
    labels = sorted((label for label in labels if np.isfinite(label.value)), key=lambda label: label.value)
    if not labels:
        return
    texts = ["\n".join(clipped(line) for line in label.text.split("\n")) for label in labels]
    longest = max(text_width(line) for text in texts for line in text.split("\n"))
    axes.figure.subplots_adjust(right=1 - (14 + longest) / axes.figure.bbox.width)
    heights = _heights(axes, labels)
    x = 1 + 8 / axes.bbox.width
    for label, text, height in zip(labels, texts, heights, strict=True):
        write(axes, x, height, text, label.color, transform=axes.transAxes, va="center", linespacing=1.15)


def label_levels(axes: Axes, labels: Sequence[Label]) -> None:
    """Write each label inside the axes at their right, above the height of its value, moved as little as needed to keep them apart."""
    labels = sorted((label for label in labels if np.isfinite(label.value)), key=lambda label: label.value)
    for label, height in zip(labels, _heights(axes, labels), strict=True):
        write(axes, 0.995, height, label.text, label.color, transform=axes.transAxes, ha="right", va="bottom")


def _heights(axes: Axes, labels: Sequence[Label]) -> np.ndarray:
    """Where labels in order of their values go, as fractions of the height of the axes."""
    if not labels:
        return np.empty(0)
    wanted = axes.transData.transform([(0, label.value) for label in labels])[:, 1]
    placed = spread(wanted, np.array([_LINE_HEIGHT * (1 + label.text.count("\n")) for label in labels]))
    return axes.transAxes.inverted().transform([(0, y) for y in placed])[:, 1]


def text_width(text: str) -> float:
    """About how wide a line of text will be, in CSS pixels: the reader's font is not known."""
    return _CHARACTER_WIDTH * len(text)


def clipped(line: str) -> str:
    """``line`` without its middle where it is too long for a margin: it begins with a name and ends with a number."""
    return line if len(line) <= _MOST_CHARACTERS else f"{line[: _MOST_CHARACTERS - 9]}\u2026{line[-8:]}"


def spread(centers: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Move boxes with increasing ``centers`` apart until none overlap, each group staying around its mean (isotonic regression).

    Arguments and result are float [boxes], in the same unit.
    """
    stacked = np.concatenate([[0.0], np.cumsum((heights[:-1] + heights[1:]) / 2)])
    blocks: list[tuple[float, int]] = []
    for target in np.asarray(centers, dtype=np.float64) - stacked:
        mean, size = target, 1
        while blocks and blocks[-1][0] > mean:
            below, below_size = blocks.pop()
            mean, size = (mean * size + below * below_size) / (size + below_size), size + below_size
        blocks.append((mean, size))
    return np.repeat([mean for mean, _ in blocks], [size for _, size in blocks]) + stacked


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep the lowest and highest point of each of a few hundred bins, so that a long run stays a small page and keeps its spikes."""
    if len(x) <= 2 * _MOST_POINTS:
        return x, y
    keep = {0, len(x) - 1}
    for chunk in np.array_split(np.arange(len(x)), _MOST_POINTS):
        finite = chunk[np.isfinite(y[chunk])]
        if len(finite):
            keep |= {int(finite[np.argmin(y[finite])]), int(finite[np.argmax(y[finite])])}
    order = np.array(sorted(keep))
    return x[order], y[order]


def smooth(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Exponential moving average over a fiftieth of the points, weighted by tokens and free of a bias at the start; float [points]."""
    decay = 1 - 1 / max(1.0, len(values) / 50)
    out, total, weight = np.empty(len(values)), 0.0, 0.0
    for i, (value, new) in enumerate(zip(values, weights, strict=True)):
        if np.isfinite(value):
            total, weight = decay * total + new * value, decay * weight + new
        out[i] = total / weight if weight else np.nan
    return out


def to_svg(figure: Figure, name: str, description: str, css_class: str = "") -> str:
    """The figure as an <svg> element that takes size, colours and font from the page.

    ``name`` keeps ids apart where several share a page; ``description`` is what a screen reader says.
    """
    buffer = io.StringIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        # matplotlib's own font only measures the text, the reader's browser draws it and has more scripts
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = re.sub(r"<defs>\s*<style.*?</defs>", "", svg[svg.index("<svg") :], count=1, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"(font-size: \d+px; )font-family: [^;]*; ", r"\1", svg)
    for variable in _VARIABLES:
        svg = svg.replace(stand_in(variable), f"var(--{variable})")
    width, height = figure.bbox.width, figure.bbox.height
    opening = f'<svg class="{css_class}" role="img" aria-label="{escape(description)}" viewBox="0 0 {width:g} {height:g}"'
    return re.sub(r"<svg[^>]*(?=>)", lambda _: opening, svg, count=1)
