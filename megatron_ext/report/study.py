"""A study's numbers: the best value of each sweep, final losses with their spread over seeds, times, and what to be warned of."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from megatron_ext.errors import DataError
from megatron_ext.report import formats
from megatron_ext.report.metrics import Run

_LAST_PART = 0.1


@dataclass(frozen=True, eq=False)
class Variant:
    """One of the things that are compared, and its runs."""

    name: str
    key: str | None
    """Dotted path that was swept, if any."""
    sweep: Mapping[float, Run]
    """By value, at the first seed; empty where nothing was swept."""
    seeds: Mapping[int, Run]
    """By seed, at the best value."""
    command: str = ""
    """That starts the run at the first seed."""

    @property
    def runs(self) -> list[Run]:
        """At the best value, in the order of seeds."""
        return list(self.seeds.values())

    @property
    def best(self) -> float | None:
        """Value of the sweep that the runs at all seeds have."""
        return best_value(self.sweep) if self.sweep else None

    @property
    def setting(self) -> str:
        """``optimizer.lr 2e-3``, or nothing where nothing was swept."""
        return "" if self.best is None else f"{self.key} {formats.learning_rate(self.best)}"


class Spread(NamedTuple):
    """A number over seeds; NaN where it is not finite at one of them."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Mean, lowest and highest."""
        return cls(float(np.mean(values)), float(np.min(values)), float(np.max(values)))


@dataclass(frozen=True)
class Result:
    """A row of the final table: one variant at its best value, over seeds. Losses in nats per token."""

    variant: Variant
    validation: Spread
    training: Spread
    difference: Spread | None
    """Of the validation loss to that of the first variant at the same seed, in percent; None of the first itself."""
    step_seconds: Spread
    """Median over the steps of a run."""
    step_ratio: Spread
    """``step_seconds`` over those of the first variant at the same seed."""
    seconds: Spread
    """Of whole runs: training, evaluations and checkpoints."""
    whole_ratio: Spread
    """``seconds`` over those of the first variant at the same seed."""


class Curve(NamedTuple):
    """Losses of one or more runs after the same steps."""

    tokens: np.ndarray
    """Training tokens, float64 [points]; of several runs, their mean."""
    losses: np.ndarray
    """Nats per token, float64 [points], or [runs, points]."""


def validation_curve(run: Run) -> Curve:
    """Loss over all validation corpora at each evaluation, each corpus weighted by the tokens of it that were evaluated.

    Raises:
        DataError: the run was never evaluated.
    """
    if not run.evals:
        raise DataError(f"{run.directory}: no evaluation in metrics.jsonl; a study compares final validation losses")
    tokens, losses = [], []
    for step in sorted({record.step for record in run.evals}):
        records = [record for record in run.evals if record.step == step]
        tokens.append(records[0].tokens)
        losses.append(np.average([record.loss for record in records], weights=[max(1, record.eval_tokens) for record in records]))
    return Curve(np.array(tokens, dtype=np.float64), np.array(losses))


def validation_loss(run: Run) -> float:
    """Of the last evaluation, in nats per token."""
    return float(validation_curve(run).losses[-1])


def training_loss(run: Run) -> float:
    """Mean over the last tenth of the training tokens, in nats per token."""
    tokens = run.column("tokens")
    weights = np.diff(tokens, prepend=0.0)
    last = tokens > (1 - _LAST_PART) * tokens[-1]
    return float(np.average(run.column("loss")[last], weights=weights[last]))


def step_seconds(run: Run) -> float:
    """Median over steps: the first step of a run and those of a busy machine do not move it."""
    return float(np.median(run.column("step_seconds")))


def diverged(run: Run) -> bool:
    """The run ended with a loss that is not finite, or lost more than half of what it had learned at its best."""
    losses = validation_curve(run).losses
    return not math.isfinite(losses[-1]) or bool(losses[-1] > (losses[0] + np.nanmin(losses)) / 2)


def best_value(sweep: Mapping[float, Run]) -> float:
    """Value with the lowest final validation loss; of equals the first.

    Raises:
        DataError: no run of the sweep ended with a finite loss.
    """
    losses = {value: validation_loss(run) for value, run in sweep.items()}
    finite = {value: loss for value, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise DataError(f"no value of the sweep {', '.join(f'{value:g}' for value in sweep)} ended with a finite loss; sweep other values")
    return min(finite, key=finite.__getitem__)


def stacked(curves: Sequence[Curve]) -> Curve:
    """Curves of the same steps as one, [runs, points]. Tokens are averaged: how many fit into a step depends on the seed."""
    return Curve(np.mean([curve.tokens for curve in curves], axis=0), np.stack([curve.losses for curve in curves]))


def differences(variant: Variant, first: Variant) -> Curve:
    """Validation loss over that of ``first`` at the same seed and tokens, less 1, in percent, [seeds, points]."""
    curves = []
    for seed, run in variant.seeds.items():
        mine, theirs = validation_curve(run), validation_curve(first.seeds[seed])
        curves.append(Curve(mine.tokens, 100 * (mine.losses / np.interp(mine.tokens, *theirs) - 1)))
    return stacked(curves)


def results(variants: Sequence[Variant]) -> list[Result]:
    """The final table, in the order of the study."""
    return [_result(variant, variants[0]) for variant in variants]


def _result(variant: Variant, first: Variant) -> Result:
    pairs = [(run, first.seeds[seed]) for seed, run in variant.seeds.items()]
    changes = [100 * (validation_loss(run) / validation_loss(other) - 1) for run, other in pairs]
    return Result(
        variant=variant,
        validation=Spread.of([validation_loss(run) for run in variant.runs]),
        training=Spread.of([training_loss(run) for run in variant.runs]),
        difference=None if variant is first else Spread.of(changes),
        step_seconds=Spread.of([step_seconds(run) for run in variant.runs]),
        step_ratio=Spread.of([step_seconds(run) / step_seconds(other) for run, other in pairs]),
        seconds=Spread.of([run.seconds for run in variant.runs]),
        whole_ratio=Spread.of([run.seconds / other.seconds for run, other in pairs]),
    )


def headline(variants: Sequence[Variant]) -> str:
    """A sentence or two: who ended lowest, and by how much; whether that is more than seeds differ."""
    rows = [row for row in results(variants) if math.isfinite(row.validation.mean)]
    if not rows:
        return "No variant ended with a finite loss at all seeds."
    ranked = sorted(rows, key=lambda row: row.validation.mean)
    first = next((row for row in rows if row.difference is None), None)
    lowest = ranked[0]
    sentence = f"{lowest.variant.name} ended with the lowest validation loss, {formats.loss(lowest.validation.mean)}"
    if len(ranked) == 1 or first is None:
        return f"{sentence}."
    compared = ranked[1] if lowest is first else lowest
    change = compared.difference
    seeds = f"{_percent(change.low)} to {_percent(change.high)} over {len(compared.variant.seeds)} seeds"
    if len(compared.variant.seeds) == 1:
        seeds = "one seed"
    subject = f"the next, {compared.variant.name}, is at {_percent(change.mean)}" if lowest is first else _percent(change.mean)
    sentence += f"; {subject} against {first.variant.name} ({seeds})."
    return sentence + (" Not every seed agrees on which of the two is better." if change.low < 0 < change.high else "")


def _percent(value: float) -> str:
    return formats.percent(value, decimals=2)


def warnings(variants: Sequence[Variant]) -> list[str]:
    """What a reader must know before believing the table, one sentence each."""
    return [*_about_sweeps(variants), *_about_runs(variants), *_about_comparison(variants)]


def _about_sweeps(variants: Sequence[Variant]) -> Iterator[str]:
    for variant in variants:
        values = list(variant.sweep)
        for end, word in ((values[:1], "smallest"), (values[-1:], "largest")):
            if variant.best in end:
                yield f"{variant.name}: the best value, {variant.setting}, is the {word} of its sweep; one beyond it may be better."


def _about_runs(variants: Sequence[Variant]) -> Iterator[str]:
    for variant in variants:
        for name, run in named_runs(variant):
            if diverged(run):
                loss = formats.loss(validation_loss(run))
                yield f"{name} diverged: it ended at a loss of {loss}, not finite or with more than half of what it had learned lost."
            if run.skipped:
                yield f"{name} skipped {len(run.skipped)} of {len(run.train)} steps."


def named_runs(variant: Variant) -> Iterator[tuple[str, Run]]:
    """Every run of a variant once, the sweep first, with its name."""
    for value, run in variant.sweep.items():
        yield f"{variant.name}, {variant.key} {formats.learning_rate(value)}", run
    swept = {run.directory for run in variant.sweep.values()}
    for seed, run in variant.seeds.items():
        if run.directory not in swept:
            yield ", ".join(filter(None, (variant.name, variant.setting, f"seed {seed}"))), run


def _about_comparison(variants: Sequence[Variant]) -> Iterator[str]:
    runs = [run for variant in variants for run in variant.runs]
    if len(variants[0].seeds) == 1:
        yield "There is one seed, so nothing is known about how much chance decides."
    tokens = {variant.name: variant.runs[0].tokens for variant in variants}
    if len(set(tokens.values())) > 1:
        words = ", ".join(f"{name} {count:,}" for name, count in tokens.items())
        yield f"The variants were trained on different numbers of tokens: {words}."
    machines = sorted({f"{start.ranks} x {start.device}" for run in runs for start in run.starts})
    if len(machines) > 1:
        yield f"The runs were not all on one kind of machine, so their times do not compare: {'; '.join(machines)}."
    if _overlap(runs):
        yield "Some runs shared the machine with others of the study, so their times compare only roughly."


def _overlap(runs: Sequence[Run]) -> bool:
    """Some run started before another one that had started earlier was over."""
    spans = sorted((run.starts[0].time, run.train[-1].time) for run in runs)
    return any(begin < end for (_, end), (begin, _) in pairwise(spans))
