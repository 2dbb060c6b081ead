"""Steps that a run skipped, and returns to a checkpoint: marks in figures and a table."""

from collections.abc import Sequence
from itertools import islice

import numpy as np
from matplotlib.axes import Axes

from megatron_ext.report import formats
from megatron_ext.report.canvas import series_color
from megatron_ext.report.events import standing
from megatron_ext.report.html import Html, element, number_cell, table
from megatron_ext.report.metrics import Run
from megatron_ext.report.records import EventRecord
from megatron_ext.report.summary import Phase, chain_of

MOST_ROWS = 100


def rollbacks(run: Run) -> list[EventRecord]:
    """The returns to a checkpoint that stand. One that was cut short and done again counts once."""
    found = [event for event in standing(run.events) if event.event == "rollback"]
    return list({str(event.details.get("number", place)): event for place, event in enumerate(found)}.values())


def mark(axes: Axes, phases: Sequence[Phase]) -> str:
    """Mark skipped steps and returns at the bottom of a figure over tokens; says what marks there are, nothing if there are none."""
    skipped = [position for phase in chain_of(phases) for position in _positions(phase, phase.run.skipped)]
    back = [position for phase in chain_of(phases) for position in _positions(phase, [event.step for event in rollbacks(phase.run)])]
    at_bottom = {"transform": axes.get_xaxis_transform(), "linestyle": "none", "markersize": 7, "clip_on": False, "zorder": 5}
    axes.plot(skipped, [0.03] * len(skipped), marker="^", color=series_color(1), **at_bottom)
    axes.plot(back, [0.09] * len(back), marker="<", color=series_color(2), **at_bottom)
    words = [f"Triangles: skipped steps ({len(skipped)})."] * bool(skipped)
    return " ".join(words + [f"Arrows to the left: where the run went back to ({len(back)} times)."] * bool(back))


def bad_steps_section(phases: Sequence[Phase]) -> list[Html]:
    """A table of the events, empty where there are none; of very many the first rows."""
    told = [(phase, event) for phase in phases for event in standing(phase.run.events) if event.event == "skip"]
    told += [(phase, event) for phase in phases for event in rollbacks(phase.run)]
    if not told:
        return []
    rows = [_row(phase, event) for phase, event in islice(sorted(told, key=lambda each: (each[0].offset, each[1].step)), MOST_ROWS)]
    words = "A skipped step read its documents and left the weights as they were. A run that went back passed over what it had read since."
    words += f" The first {MOST_ROWS} of {len(told)}." if len(told) > MOST_ROWS else ""
    header = [("phase", False), ("step", True), ("what", False), ("why", False), ("loss", True), ("gradient norm", True)]
    return [element("h2", "Steps that were skipped"), element("p", words, class_="muted"), table(header, rows)]


def _row(phase: Phase, event: EventRecord) -> Html:
    details = event.details
    if event.event == "rollback":
        what = f"went back from step {details.get('last_step', '?')}"
        causes = [str(cause.get("step", "?")) for cause in _list(details.get("causes")) if isinstance(cause, dict)]
        why = f"skipped: {', '.join(causes)}" if causes else ""
    else:
        what, why = "skipped", ", ".join(str(reason).replace("_", " ") for reason in _list(details.get("reasons")))
    numbers = [_number(details.get(key)) for key in ("loss", "grad_norm")]
    cells = [element("td", phase.label), number_cell(f"{event.step:,}"), element("td", what), element("td", why)]
    return element("tr", *cells, *map(number_cell, numbers), class_="control" if phase.is_control else "")


def _positions(phase: Phase, at: Sequence[int]) -> list[float]:
    """Total tokens at each of these steps that the run has a record of or that lies between two."""
    steps, tokens = phase.run.column("step"), phase.run.column("tokens")
    return [phase.offset + float(np.interp(step, steps, tokens)) for step in at] if len(steps) else []


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _number(value: object) -> str:
    return formats.number(float(value), 3) if isinstance(value, int | float) else ""
