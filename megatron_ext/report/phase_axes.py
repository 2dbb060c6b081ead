"""What the figures of a report have in common: an axis of the tokens of all phases, and curves of a value of each step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, PercentFormatter

from megatron_ext.report import canvas
from megatron_ext.report.canvas import series_color, stand_in
from megatron_ext.report.summary import Phase, chain_of

NARROW = 380
"""Width of a figure that a phone shows, in CSS pixels."""
WIDE = 1080
"""Width of a figure over the whole page."""
HALF = 420
"""Width of a figure that shares a row of the page with another."""


@dataclass(frozen=True)
class Figure:
    """A drawing and its words."""

    title: str
    caption: str
    svg: str
    legend: tuple[tuple[str, str], ...] = ()
    """Name of a colour of the page, and what it stands for."""


def has(phases: Sequence[Phase], column: str) -> bool:
    """Some step has a number there."""
    return any(np.isfinite(phase.run.column(column)).any() for phase in chain_of(phases))


def curve_of_steps(
    phases: Sequence[Phase], column: str, title: str, caption: str, ticks: Callable[[float, int], str] | PercentFormatter
) -> Figure | None:
    """One value of each step from zero up, or None where no step has it; a long noisy curve gets a moving average."""
    if not has(phases, column):
        return None
    figure, (axes,) = canvas.new_figure(HALF, 220)
    plot_column(axes, phases, column)
    axes.set_ylim(0, axes.get_ylim()[1])
    axes.yaxis.set_major_formatter(ticks if isinstance(ticks, PercentFormatter) else FuncFormatter(ticks))
    finish_token_axis(axes, phases)
    return Figure(title, caption, canvas.to_svg(figure, column.replace("_", "-"), f"{title}. {caption}"))


def plot_column(axes: Axes, phases: Sequence[Phase], column: str) -> None:
    """One value of each step, faint, and its moving average, strong."""
    for phase in chain_of(phases):
        tokens, values = phase.offset + phase.run.column("tokens"), phase.run.column(column)
        smoothed = values if column == "lr" else canvas.smooth(values, np.ones(len(values)))
        axes.plot(*canvas.thin(tokens, values), color=series_color(0), linewidth=0.8, alpha=0.4)
        axes.plot(*canvas.thin(tokens, smoothed), color=series_color(0), linewidth=1.5, marker="o" if len(tokens) == 1 else None)


def finish_token_axis(axes: Axes, phases: Sequence[Phase]) -> None:
    """Total tokens on x, a line where one phase ends and the next begins, and the phases' names."""
    chain = chain_of(phases)
    canvas.token_axis(axes, 0, max(phase.end for phase in phases), "training tokens, all phases" if len(chain) > 1 else "training tokens")
    for phase in chain if len(chain) > 1 else []:
        middle = (phase.offset + phase.end) / 2
        canvas.write(axes, middle, 1.02, phase.label, stand_in("muted"), transform=axes.get_xaxis_transform(), ha="center", va="bottom")
        if phase.offset:
            axes.axvline(phase.offset, color=stand_in("muted"), linewidth=1)
