"""The figures of how ranks shared packs. Each is drawn from a list of phases, as those of ``figures``."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from megatron_ext.report import canvas, formats
from megatron_ext.report.canvas import stand_in
from megatron_ext.report.gantt import degree_color
from megatron_ext.report.metrics import Run
from megatron_ext.report.phase_axes import HALF, Figure, curve_of_steps, finish_token_axis
from megatron_ext.report.plans import sharing
from megatron_ext.report.summary import Phase, chain_of

_MOST_BARS = 120
_STALL = 0.01


def degrees(phases: Sequence[Phase]) -> Figure | None:
    """Share of each step's tokens by the ranks that share their pack, or None where no step says so."""
    found = sharing(phases)
    if found is None or not found.tokens_by_degree:
        return None
    by_degree, total = found.tokens_by_degree, sum(found.tokens_by_degree.values())
    figure, (axes,) = canvas.new_figure(HALF, 220)
    for phase in chain_of(phases):
        _stack(axes, phase, list(by_degree))
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    finish_token_axis(axes, phases)
    title = "Tokens by degree"
    caption = (
        f"Share of each step's tokens by the number of ranks that share their pack.{_taken_together(phases)} In the legend: of all steps."
    )
    legend = [(degree_color(degree), f"degree {degree}: {formats.share(tokens / total)}") for degree, tokens in by_degree.items()]
    described = f"{title}. {caption} {', '.join(text for _, text in legend)}."
    return Figure(title, caption, canvas.to_svg(figure, "degrees", described), tuple(legend))


def _stack(axes: Axes, phase: Phase, by_degree: Sequence[int]) -> None:
    """Bars of all degrees, each as wide as the tokens of its steps: the highest first and the others before it, so that no seams show."""
    edges, shares = degree_shares(phase.run, by_degree)
    for degree, tops in reversed(list(zip(by_degree, np.cumsum(shares, axis=0), strict=True))):
        axes.stairs(tops, phase.offset + edges, fill=True, color=stand_in(degree_color(degree)), linewidth=0)


def degree_shares(run: Run, by_degree: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Share of tokens by degree of each step, or of some hundred groups of neighbouring steps.

    Returns:
        Tokens of the run before the first group and at the end of each, float64 [groups + 1], and shares, float64 [degrees, groups]:
        NaN in groups without a number.
    """
    if not run.train:
        return np.zeros(1), np.zeros((len(by_degree), 0))
    borders = np.unique(np.linspace(0, len(run.train), min(len(run.train), _MOST_BARS) + 1).round().astype(int))
    tokens = np.array([[record.tokens_by_degree.get(str(degree), 0) for record in run.train] for degree in by_degree], dtype=np.float64)
    groups = np.add.reduceat(tokens, borders[:-1], axis=1)
    totals = groups.sum(axis=0)
    shares = np.divide(groups, totals, out=np.full_like(groups, np.nan), where=totals > 0)
    return np.concatenate([[0.0], run.column("tokens")[borders[1:] - 1]]), shares


def _taken_together(phases: Sequence[Phase]) -> str:
    longest = max(len(phase.run.train) for phase in chain_of(phases))
    return f" Up to {-(-longest // _MOST_BARS)} neighbouring steps are taken together." if longest > _MOST_BARS else ""


def gap(phases: Sequence[Phase]) -> Figure | None:
    """Predicted seconds of each step above their lower bound, or None where no step has a bound below them."""
    caption = "By how much the predicted seconds of a step exceed those that no plan can go below."
    return _shares(phases, "plan_gap", "Gap to the lower bound", caption, above=0.0)


def exchanges(phases: Sequence[Phase]) -> Figure | None:
    """Share of each step in all-to-alls, or None where they were not measured."""
    return _shares(phases, "exchange_share", "Time in exchanges", "Share of a step's seconds in all-to-alls, mean over ranks.", above=0.0)


def stalls(phases: Sequence[Phase]) -> Figure | None:
    """Share of each step that training waited for its plan, or None where it never was more than a hundredth."""
    return _shares(phases, "stall_share", "Waiting for plans", "Share of a step's seconds before its plan was ready.", above=_STALL)


def _shares(phases: Sequence[Phase], column: str, title: str, caption: str, above: float) -> Figure | None:
    if not any((phase.run.column(column) > above).any() for phase in chain_of(phases)):
        return None
    return curve_of_steps(phases, column, title, caption, lambda value, _: f"{100 * value:g} %")


def curves(phases: Sequence[Phase]) -> list[Figure]:
    """Every figure over the steps of a run that has something to show."""
    return [figure for maker in (degrees, gap, exchanges, stalls) if (figure := maker(phases)) is not None]
