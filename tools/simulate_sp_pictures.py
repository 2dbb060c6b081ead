"""Pictures of simulate_sp.py: one step on all ranks under each policy, and where adapting pays."""

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from simulate_sp_sensitivity import GROUPED, LINKS, MEMORY, TAILS, Cell, Surface

from megatron_ext.planning.simulator import Judged, Machine, Simulation

OF_ALL = "0.8"
"""Colour of what all ranks do together once a step."""


def gantt(path: str, simulation: Simulation, title: str) -> None:
    """Ranks by time for the first batch, a panel each policy, packs coloured by their degree."""
    results = [simulation.of(policy, simulation.perturbs[0])[0] for policy in simulation.planners]
    degrees = sorted({pack.degree for each in results if each.planned.plan for pack in each.planned.plan.packs if pack.slices})
    colours = matplotlib.colormaps["viridis"].resampled(max(2, simulation.machine.devices.bit_length()))
    figure = Figure(figsize=(11, 1.1 + 1.65 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 1, sharex=True, squeeze=False)[:, 0]
    for panel, result in zip(panels, results, strict=True):
        draw_step(panel, result, simulation.machine, colours)
    panels[-1].set_xlabel("seconds since the step began (SIMULATED)")
    panels[0].set_xlim(0, 1.02 * max(each.verdict.timeline.seconds for each in results if each.verdict))
    legend = [Patch(facecolor=colours(degree.bit_length() - 1), label=str(degree)) for degree in degrees]
    legend.append(Patch(facecolor="white", edgecolor="0.6", label="idle"))
    if simulation.machine.cost.per_step:
        legend.append(Patch(facecolor=OF_ALL, label="all: gradients, update"))
    figure.legend(handles=legend, title="ranks that compute a pack together", loc="outside lower center", ncols=len(legend), frameon=False)
    figure.suptitle(f"{title}\none step, batch {results[0].batch}", fontsize=11)
    figure.savefig(path, dpi=130)


def draw_step(panel: Axes, result: Judged, machine: Machine, colours: Colormap) -> None:
    """One policy's step."""
    devices = machine.devices
    panel.set_ylim(devices, 0)
    panel.set_ylabel("rank")
    panel.set_yticks([0, devices // 2, devices])
    panel.spines[["top", "right"]].set_visible(False)
    if result.verdict is None or result.planned.plan is None:
        panel.set_title(f"{result.planned.policy}: no plan fits (OOM)", loc="left", fontsize=10)
        return
    times = result.verdict.timeline
    for pack, begin, end in zip(result.planned.plan.packs, times.begin, times.end, strict=True):
        if pack.slices:
            place = (begin, pack.first_rank)
            panel.add_patch(
                Rectangle(
                    place, end - begin, pack.degree, facecolor=colours(pack.degree.bit_length() - 1), edgecolor="white", linewidth=0.3
                )
            )
    panel.axvspan(times.seconds - machine.cost.per_step, times.seconds, color=OF_ALL)
    panel.axvline(times.seconds, color="crimson", linewidth=1.2)
    words = (
        "OOM" if result.verdict.oom else f"{times.seconds:.2f} s, {result.verdict.idle:.0%} idle, {result.verdict.exchange:.0%} exchanges"
    )
    panel.set_title(f"{result.planned.policy}: {words}", loc="left", fontsize=10)


def surfaces(path: str, found: Sequence[Surface], title: str) -> None:
    """A panel for each memory and tail: links by heads, coloured by static / adaptive; red frames where adaptive loses."""
    by_cell = {each.cell: each.ratio for each in found}
    farthest = max([1.05, *(max(ratio, 1 / ratio) for ratio in by_cell.values() if ratio == ratio)])
    norm = LogNorm(1 / farthest, farthest)
    figure = Figure(figsize=(3.2 * len(MEMORY) + 1.5, 1.75 * len(TAILS) + 1.4), layout="constrained")
    panels = figure.subplots(len(TAILS), len(MEMORY), sharex=True, sharey=True, squeeze=False)
    for row, tail in enumerate(TAILS):
        for column, memory in enumerate(MEMORY):
            panel = panels[row, column]
            values = [[by_cell[Cell(links, grouped, memory, tail)] for links in LINKS] for grouped in GROUPED]
            image = panel.imshow(values, cmap="PuOr", norm=norm, aspect="auto")
            for y, line in enumerate(values):
                for x, value in enumerate(line):
                    write_cell(panel, x, y, value, abs(norm(value) - 0.5) > 0.35)
            panel.set_title(f"memory for tokens x{memory:g}, tail exponent x{tail:g}", fontsize=9)
            panel.set_xticks(range(len(LINKS)), [f"x{links:g}" for links in LINKS])
            panel.set_yticks(range(len(GROUPED)), ["1" if grouped == 1 else f"1/{grouped}" for grouped in GROUPED])
    figure.supxlabel("speed of all-to-alls", fontsize=10)
    figure.supylabel("key/value heads, relative to the model's", fontsize=10)
    bar = figure.colorbar(image, ax=panels, label="seconds of the best static degree / adaptive", shrink=0.8)
    ticks = [1 / farthest, farthest**-0.5, 1.0, farthest**0.5, farthest]
    bar.set_ticks(ticks, labels=[f"{tick:.2f}" for tick in ticks])
    bar.minorticks_off()
    words = "best static degree for each step (better of best-fit and balanced packing) over adaptive: above 1 adaptive is faster"
    figure.suptitle(f"{title}\n{words}; red frames: it loses", fontsize=11)
    figure.savefig(path, dpi=130)


def write_cell(panel: Axes, x: int, y: int, value: float, is_dark: bool) -> None:
    """A ratio in its cell, framed where adaptive loses."""
    panel.text(x, y, f"{value:.2f}" if value == value else "-", ha="center", va="center", fontsize=7, color="white" if is_dark else "black")
    if value < 1:
        panel.add_patch(Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, fill=False, edgecolor="red", linewidth=1.2))
