"""How a run went on its machines: what happened to it, and which ranks were slow."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.report import formats
from megatron_ext.report.html import Html, element, number_cell, table
from megatron_ext.report.metrics import Run
from megatron_ext.report.records import EventRecord
from megatron_ext.report.summary import Phase

ROUTINE = ("save", "evict")
"""Events that go well all the time, and are left out."""
MOST_EVENTS = 200
USUAL_RATIO = 1.5
"""From which a rank counts as slow where the configuration of a run does not say it."""


@dataclass(frozen=True)
class SlowRank:
    """A rank that was the slowest of its step and slow by the measure of the run."""

    rank: int
    steps: int
    worst: float
    """Seconds of own work over the median of its stage."""
    told: int
    """Times that it was told about, after many slow steps in a row."""


def slow_ranks(run: Run) -> list[SlowRank]:
    """The ranks that were slow, those of most steps first."""
    logging = run.config.get("logging")
    least = logging.get("straggler_ratio", USUAL_RATIO) if isinstance(logging, dict) else USUAL_RATIO
    steps: Counter[int] = Counter()
    worst: dict[int, float] = {}
    for record in run.train:
        if record.slowest_ratio >= least:
            steps[record.slowest_rank] += 1
            worst[record.slowest_rank] = max(record.slowest_ratio, worst.get(record.slowest_rank, 0.0))
    told = Counter(event.details.get("rank") for event in run.events if event.event == "straggler")
    return [SlowRank(rank, count, worst[rank], told[rank]) for rank, count in steps.most_common()]


def operation(phases: Sequence[Phase]) -> list[Html]:
    """The section of a page, empty where nothing but saves happened and no rank was slow."""
    happened = [(phase, event) for phase in phases for event in phase.run.events if event.event not in ROUTINE]
    slow = [(phase, rank) for phase in phases for rank in slow_ranks(phase.run)]
    parts = [element("h2", "What happened")] if happened or slow else []
    if happened:
        rows = [_event_row(phase, event) for phase, event in happened[-MOST_EVENTS:]]
        left = len(happened) - len(rows)
        words = f"Saves are left out{f', and the first {left} events' if left else ''}; also steps that were computed again later."
        parts += [element("p", words, class_="muted"), table([(name, False) for name in ("phase", "when", "step", "event", "")], rows)]
    if slow:
        names = [("phase", False), ("slow rank", True), ("steps", True), ("worst ratio", True), ("told", True)]
        words = "Ranks whose own work in a step took far longer than the median of their stage."
        rows = [
            element(
                "tr",
                element("td", phase.label),
                *map(number_cell, (str(each.rank), f"{each.steps:,}", formats.number(each.worst), str(each.told))),
            )
            for phase, each in slow
        ]
        parts += [element("p", words, class_="muted"), table(names, rows)]
    return parts


def _event_row(phase: Phase, event: EventRecord) -> Html:
    when = formats.moment(event.time) if math.isfinite(event.time) else ""
    details = ", ".join(f"{key} {value}" for key, value in event.details.items() if isinstance(value, str | int) and key != "tokens")
    return element("tr", *(element("td", text) for text in (phase.label, when, f"{event.step:,}", event.event, details[:200])))
