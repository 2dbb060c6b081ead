"""The first and the last recorded plan as bars: ranks down, predicted seconds across."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from megatron_ext.report import canvas, formats
from megatron_ext.report.canvas import stand_in
from megatron_ext.report.phase_axes import NARROW, WIDE, Figure
from megatron_ext.report.records import PlanRecord
from megatron_ext.report.summary import Phase, chain_of

MOST_RANKS = 64
"""Rows of a panel; of more ranks only some are shown."""

_ROW = 22
_LOWEST, _HIGHEST = 72, 352
_ABOVE, _BELOW = 42, 42


def degree_color(degree: int) -> str:
    """Name of the page's colour of packs that ``degree`` ranks share: grey for packs that are not shared."""
    return f"series-{(degree.bit_length() - 2) % canvas.SERIES}"


@dataclass(frozen=True, eq=False)
class Panel:
    """A plan and the ranks of it that are shown."""

    name: str
    plan: PlanRecord

    @cached_property
    def ranks(self) -> range:
        """All, or those beside a rank that ends last."""
        work, devices = self.plan.work, self.plan.devices
        last = int(work["first_rank"][np.argmax(work["end"])])
        first = last - last % MOST_RANKS
        return range(first, min(first + MOST_RANKS, devices)) if devices > MOST_RANKS else range(devices)

    @cached_property
    def packs(self) -> np.ndarray:
        """Packs of the ranks that are shown."""
        work = self.plan.work
        return work[(work["first_rank"] < self.ranks.stop) & (work["first_rank"] + work["degree"] > self.ranks.start)]

    @property
    def end(self) -> float:
        """Predicted seconds until the last rank is done."""
        return max(self.plan.seconds, float(self.plan.work["end"].max()))

    @property
    def heading(self) -> str:
        """Two lines above the panel."""
        ranks = f", ranks {self.ranks.start} to {self.ranks.stop - 1} of {self.plan.devices}" if self.plan.devices > MOST_RANKS else ""
        bound = f"; lower bound {formats.seconds(self.plan.bound)} (dashed)" if self.plan.bound > 0 else ""
        return f"{self.name}{ranks}\npredicted end {formats.seconds(self.plan.seconds)}{bound}"


def plan_timeline(phases: Sequence[Phase]) -> Figure | None:
    """The first and the last plan that was recorded, or None where there is none."""
    recorded = [(phase, plan) for phase in chain_of(phases) for plan in phase.run.plans if len(plan.work) and plan.seconds > 0]
    if not recorded:
        return None
    panels = []
    for phase, plan in recorded[:1] + recorded[1:][-1:]:
        name = f"{canvas.clipped(phase.label)}, step" if len(chain_of(phases)) > 1 else "Step"
        panels.append(Panel(f"{name} {plan.step:,}", plan))
    title = "Ranks during the first and the last recorded step, predicted" if len(panels) > 1 else "Ranks during a step, predicted"
    caption = _caption(panels)
    drawings = [_draw(panels, width, css_class, f"{title}. {caption}") for css_class, width in (("wide", WIDE), ("narrow", NARROW))]
    degrees = np.unique(np.concatenate([panel.packs["degree"] for panel in panels])).tolist()
    legend = [(degree_color(degree), "1 rank" if degree == 1 else f"{degree} ranks share a pack") for degree in degrees]
    return Figure(title, caption, "".join(drawings), (*legend, ("grid", "idle")))


def _caption(panels: Sequence[Panel]) -> str:
    """What there is to see, and the last plan in numbers."""
    plan = panels[-1].plan
    words = (
        "A row is a rank, a bar is a pack with its tokens, as high as the ranks that share it. Predicted by the cost model, not measured."
    )
    if max(panel.plan.devices for panel in panels) > MOST_RANKS:
        words += f" Of more than {MOST_RANKS} ranks, those around the one that ends last are shown."
    if plan.in_rounds:
        words += " All ranks wait for each other between packs."
    words += f" {panels[-1].name}: {len(plan.work):,} packs on {plan.devices:,} ranks, {formats.seconds(plan.seconds)}"
    if plan.bound > 0:
        words += f", {formats.share(plan.seconds / plan.bound - 1)} above the lower bound"
    return f"{words}, ranks idle {formats.share(plan.idle)} of the time."


def _draw(panels: Sequence[Panel], width: int, css_class: str, description: str) -> str:
    rows = min(max(_LOWEST, _ROW * max(len(panel.ranks) for panel in panels)), _HIGHEST)
    height = len(panels) * (rows + _ABOVE) + _BELOW
    figure, all_axes = canvas.new_figure(width, height, rows=len(panels))
    figure.subplots_adjust(top=1 - _ABOVE / height, hspace=_ABOVE / rows)
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw_panel(axes, panel)
    canvas.seconds_axis(all_axes[-1], 0, max(panel.end for panel in panels), "predicted seconds since the step began")
    for axes, panel in zip(all_axes, panels, strict=True):
        _write_tokens(axes, panel)
    return canvas.to_svg(figure, f"plans-{css_class}", description, css_class)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    ranks, plan = panel.ranks, panel.plan
    axes.grid(False)
    axes.set_ylim(ranks.stop, ranks.start)
    axes.axvspan(0, plan.seconds, color=stand_in("grid"), linewidth=0, zorder=0)
    for degree in np.unique(panel.packs["degree"]).tolist():
        chosen = panel.packs[panel.packs["degree"] == degree]
        axes.add_patch(PathPatch(_bars(chosen), facecolor=stand_in(degree_color(degree)), edgecolor=stand_in("surface"), linewidth=0.6))
    axes.axvline(plan.seconds, color=stand_in("ink"), linewidth=1.5, clip_on=False, zorder=3)
    if plan.bound > 0:
        axes.axvline(plan.bound, color=stand_in("surface"), linewidth=3, zorder=3)
        axes.axvline(plan.bound, color=stand_in("ink"), linewidth=1.5, dashes=(4, 3), zorder=3)
    stride = 1
    while stride * axes.bbox.height / len(ranks) < 14:
        stride *= 2
    shown = np.arange(ranks.start, ranks.stop, stride)
    axes.set_yticks(shown + 0.5, [str(rank) for rank in shown])
    canvas.write(axes, 0, 1 + 6 / axes.bbox.height, panel.heading, stand_in("ink"), transform=axes.transAxes, va="bottom", linespacing=1.2)
    rank = {"transform": axes.transAxes, "ha": "right", "va": "bottom"}
    canvas.write(axes, -4 / axes.bbox.width, 1 + 6 / axes.bbox.height, "rank", stand_in("muted"), **rank)


def _bars(packs: np.ndarray) -> Path:
    """A rectangle for each pack, as one path."""
    left, right, top = packs["begin"], packs["end"], packs["first_rank"]
    bottom = top + packs["degree"]
    corners = np.stack([(left, top), (right, top), (right, bottom), (left, bottom), (left, top)])
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    return Path(corners.transpose(2, 0, 1).reshape(-1, 2), codes * len(packs))


def _write_tokens(axes: Axes, panel: Panel) -> None:
    """The tokens of each pack where its bar has room for them beside the bound; the limits of both axes must be final."""
    per_second, per_rank = axes.bbox.width / np.ptp(axes.get_xlim()), axes.bbox.height / len(panel.ranks)
    for pack in panel.packs:
        text = formats.count(int(pack["tokens"]))
        room = canvas.text_width(text) + 8
        middle, width = (pack["begin"] + pack["end"]) / 2, pack["end"] - pack["begin"]
        top, bottom = max(pack["first_rank"], panel.ranks.start), min(pack["first_rank"] + pack["degree"], panel.ranks.stop)
        on_bound = abs(middle - panel.plan.bound) * per_second < room / 2
        if room < width * per_second and (bottom - top) * per_rank > 14 and not on_bound:
            canvas.write(axes, middle, (top + bottom) / 2, text, stand_in("surface"), ha="center", va="center")
