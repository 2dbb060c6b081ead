"""A report's numbers: phases on one axis of tokens, the final table, the headline."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_ext.errors import DataError
from megatron_ext.report import formats
from megatron_ext.report.metrics import Run
from megatron_ext.report.records import EvalRecord

_HEADLINE_SOURCES = 3


@dataclass(frozen=True, eq=False)
class Phase:
    """A run and its place in the report."""

    label: str
    run: Run
    offset: int
    """Training tokens of all phases before this one."""
    is_control: bool = False
    """The run is an alternative to the last phase and not a part of the chain."""

    @property
    def end(self) -> int:
        """Training tokens up to the end of this phase."""
        return self.offset + self.run.tokens


@dataclass(frozen=True, eq=False)
class SourceResult:
    """What one phase did to one source. Losses and entropy in nats per token; None when not measured."""

    phase: Phase
    source: str
    split: str
    name: str
    """The source, with its split where it was evaluated on several."""
    first_loss: float | None
    last_loss: float | None
    change: float | None
    """Of the loss from the first to the last evaluation of the phase, in percent."""
    unigram_entropy: float | None
    tokens: int
    """Training tokens of the phase that came from this source."""
    epochs: float | None
    """How often the phase has read the source."""
    is_earlier: bool
    """An earlier phase trained on this source, so that a higher loss is forgetting."""


def arrange(runs: Sequence[Run], compare: Mapping[str, Run] | None = None) -> list[Phase]:
    """Put runs one after the other, then the control runs, each starting where the last run started.

    Raises:
        DataError: there is no run.
    """
    if not runs:
        raise DataError("a report needs at least one run directory")
    names = [run.name for run in runs]
    phases: list[Phase] = []
    for i in range(len(runs)):
        label = names[i] if names.count(names[i]) == 1 else f"{names[i]} {names[: i + 1].count(names[i])}"
        phases.append(Phase(label, runs[i], phases[-1].end if phases else 0))
    controls = [Phase(label, run, phases[-1].offset, is_control=True) for label, run in (compare or {}).items()]
    return phases + controls


def chain_of(phases: Sequence[Phase]) -> list[Phase]:
    """The phases that continue each other, without control runs."""
    return [phase for phase in phases if not phase.is_control]


def source_order(phases: Sequence[Phase]) -> list[str]:
    """Every source of every phase, in order of first appearance: the order of colours."""
    return list(dict.fromkeys(source for phase in phases for source in phase.run.sources))


def source_names(phases: Sequence[Phase]) -> dict[tuple[str, str], str]:
    """What figures and tables call each evaluated (source, split): the source alone unless it was evaluated on several splits."""
    keys = dict.fromkeys((record.source, record.split) for phase in phases for record in phase.run.evals)
    evaluated = [source for source, _ in keys]
    return {(source, split): source if evaluated.count(source) == 1 else f"{source} ({split})" for source, split in keys}


def evaluations(evals: Sequence[EvalRecord]) -> dict[tuple[str, str], list[EvalRecord]]:
    """The evaluations of each (source, split), in the order in which they come."""
    curves: dict[tuple[str, str], list[EvalRecord]] = {}
    for record in evals:
        curves.setdefault((record.source, record.split), []).append(record)
    return curves


def results(phases: Sequence[Phase]) -> list[SourceResult]:
    """The final table: a row for each phase and each source that it trained or evaluated on."""
    rows: list[SourceResult] = []
    names = source_names(phases)
    for phase in phases:
        earlier = {source for before in phases_before(phase, phases) for source, n in before.run.tokens_by_source.items() if n}
        curves = evaluations(phase.run.evals)
        evaluated = {source for source, _ in curves}
        unevaluated = [(source, "") for source in phase.run.sources if source not in evaluated]
        for source, split in [*curves, *unevaluated]:
            losses = [record.loss for record in curves.get((source, split), [])]
            rows.append(_result(phase, source, split, names.get((source, split), source), losses, source in earlier))
    return rows


def phases_before(phase: Phase, phases: Sequence[Phase]) -> list[Phase]:
    """The phases whose model ``phase`` continued."""
    chain = chain_of(phases)
    return chain[:-1] if phase.is_control else chain[: chain.index(phase)]


def _result(phase: Phase, source: str, split: str, name: str, losses: list[float], is_earlier: bool) -> SourceResult:
    changed = len(losses) > 1 and losses[0] > 0
    return SourceResult(
        phase=phase,
        source=source,
        split=split,
        name=name,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        change=100 * (losses[-1] / losses[0] - 1) if changed else None,
        unigram_entropy=phase.run.unigram_entropy.get(source),
        tokens=phase.run.tokens_by_source.get(source, 0),
        epochs=phase.run.epochs.get(source),
        is_earlier=is_earlier,
    )


def headline(phases: Sequence[Phase]) -> str:
    """Two or three sentences with the outcome of the last phase, in numbers, and of the control runs."""
    rows = [row for row in results(phases) if row.change is not None and math.isfinite(row.change)]
    chain = chain_of(phases)
    last = [row for row in rows if row.phase is chain[-1]]
    if not last:
        return _headline_without_evaluations(chain[-1])
    learned = sorted(last, key=lambda row: (row.is_earlier, -row.tokens))
    sentence = f"In {chain[-1].label}, " + "; ".join(_clause(row) for row in learned[:_HEADLINE_SOURCES])
    if len(learned) > _HEADLINE_SOURCES:
        sentence += f"; {len(learned) - _HEADLINE_SOURCES} more in the table"
    sentences = [sentence + "."]
    for control in phases[len(chain) :]:
        forgotten = [row for row in rows if row.phase is control and (row.is_earlier or len(chain) == 1)]
        if forgotten:
            sentences.append(f"For comparison, {control.label}: " + "; ".join(_clause(row) for row in forgotten[:_HEADLINE_SOURCES]) + ".")
    return " ".join(sentences)


def _clause(row: SourceResult) -> str:
    """``code loss fell 35.7 %, from 5.91 to 3.80``, with a reminder where the source was learned before."""
    verb = "fell" if row.change < 0 else "rose"
    subject = f"{row.name} loss, learned before," if row.is_earlier else f"{row.name} loss"
    return f"{subject} {verb} {abs(row.change):.1f} %, from {row.first_loss:.2f} to {row.last_loss:.2f}"


def _headline_without_evaluations(phase: Phase) -> str:
    if not phase.run.train:
        return f"{phase.label} has not finished a step."
    first, last = phase.run.train[0], phase.run.train[-1]
    trained = f"{phase.label} trained on {formats.count(phase.run.tokens)} tokens"
    if first is last:
        return f"{trained} in one step, with a training loss of {formats.loss(last.loss)}; no loss was measured before and after."
    return f"{trained}; the training loss went from {formats.loss(first.loss)} to {formats.loss(last.loss)}. It was not evaluated twice."
