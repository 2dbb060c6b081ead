"""What a phase did to each domain on the way, and not only at its end: the stability gap.

A loss may rise as soon as training on something else begins, and come back later; first and last loss do not show it. The worst rise is for
losses what min-ACC is for accuracies in De Lange et al. 2023 (arXiv:2205.13452), who found the gap; Guo et al. 2024 (arXiv:2406.14833)
found it in continued pretraining. All numbers are of the evaluations that a run wrote: between two of them the loss may have been higher.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_ext.report import formats
from megatron_ext.report.records import EvalRecord
from megatron_ext.report.summary import Phase, evaluations, phases_before, source_names

Domain = Literal["old", "new", "other"]
"""``old``: trained on in an earlier phase, or replayed. ``new``: trained on in this phase first. ``other``: not trained on."""


@dataclass(frozen=True)
class StabilityGap:
    """The way of one validation loss, in nats a token; tokens count from the begin of the phase."""

    start: float
    worst_rise: float
    """Largest loss less that at the start; 0 if it was never higher. Infinite after a loss that is no number."""
    worst_tokens: int
    """When it was that high; 0 if it was never higher than at the start."""
    recovery_tokens: int | None
    """The first evaluation after the worst that is not above the start; 0 if none was above it, None if the loss did not come back."""
    final_difference: float
    """Last loss less that at the start."""


@dataclass(frozen=True, eq=False)
class Forgetting:
    """The stability gap of one source in one phase."""

    phase: Phase
    source: str
    name: str
    """The source, with its split where it was evaluated on several."""
    domain: Domain
    gap: StabilityGap


def stability_gap(curve: Sequence[EvalRecord]) -> StabilityGap:
    """The gap of evaluations of one source, at least one, in the order of steps; the first is the start."""
    losses = [record.loss if math.isfinite(record.loss) else math.inf for record in curve]
    start, begin = losses[0], curve[0].tokens
    worst = max(range(len(losses)), key=lambda place: losses[place])
    if not losses[worst] > start:
        return StabilityGap(start, 0.0, 0, 0, losses[-1] - start)
    back = (record.tokens - begin for record, loss in zip(curve[worst:], losses[worst:], strict=True) if loss <= start)
    return StabilityGap(start, losses[worst] - start, curve[worst].tokens - begin, next(back, None), losses[-1] - start)


def forgetting(phases: Sequence[Phase]) -> list[Forgetting]:
    """The gap of every source of every phase that was evaluated at least twice."""
    names, found = source_names(phases), []
    for phase in phases:
        earlier = {source for before in phases_before(phase, phases) for source, n in before.run.tokens_by_source.items() if n}
        trained = [source for source, tokens in phase.run.tokens_by_source.items() if tokens]
        for (source, split), curve in evaluations(phase.run.evals).items():
            if len(curve) > 1:
                where = domain(source, trained, new_sources(phase.run.config) or trained, earlier)
                found.append(Forgetting(phase, source, names[source, split], where, stability_gap(curve)))
    return found


def domain(source: str, trained: Collection[str], new: Collection[str], earlier: Collection[str] = ()) -> Domain:
    """What a source is to a phase.

    Args:
        source: its name.
        trained: sources that the phase trains on.
        new: those of them that are not replayed.
        earlier: sources that earlier phases trained on.
    """
    if source in earlier or (source in trained and source not in new):
        return "old"
    return "new" if source in trained else "other"


def new_sources(config: dict[str, object]) -> list[str]:
    """Names in ``data.sources`` of the configuration of a run; what else it trains on is replayed."""
    data = config.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    return [str(each.get("name")) for each in sources or [] if isinstance(each, dict)]


def worth_telling(rows: Sequence[Forgetting]) -> list[Forgetting]:
    """The rows of the phases that could have forgotten something; see ``_may_forget``."""
    phases = [row.phase for row in rows if _may_forget(row.domain, row.gap)]
    return [row for row in rows if row.phase in phases]


def described(evals: Sequence[EvalRecord], trained: Collection[str], new: Collection[str]) -> list[str]:
    """Lines for a console about one run, empty if there was nothing to forget. Arguments as of ``Run.evals`` and ``domain``."""
    gaps = [
        (source, domain(source, trained, new), stability_gap(curve)) for (source, _), curve in evaluations(evals).items() if len(curve) > 1
    ]
    return [_line(*each) for each in gaps] if any(_may_forget(where, gap) for _, where, gap in gaps) else []


def recovery(gap: StabilityGap) -> str:
    """When the loss was back at its start."""
    if gap.recovery_tokens is None:
        return "not recovered"
    return f"recovered after {formats.count(gap.recovery_tokens)} tokens" if gap.recovery_tokens else "never above the start"


def _may_forget(where: Domain, gap: StabilityGap) -> bool:
    """An old domain, or a loss that rose though nothing of its source was trained on."""
    return where == "old" or (where == "other" and gap.worst_rise > 0)


def _line(name: str, where: Domain, gap: StabilityGap) -> str:
    worst = f", worst {gap.worst_rise:+.3f} after {formats.count(gap.worst_tokens)} tokens" if gap.worst_rise else ""
    return f"{name} ({where}): loss {formats.loss(gap.start)} at the start{worst}, {recovery(gap)}, in the end {gap.final_difference:+.3f}"
