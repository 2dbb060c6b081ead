"""The losses that a mixture law is fitted to: of run directories, or of a table."""

import csv
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.errors import DataError
from megatron_ext.option_rules import shown
from megatron_ext.report.metrics import Run, read_run
from megatron_ext.report.mixture_law import Points

COLUMNS = ("share", "tokens", "general_loss", "domain_loss")
_LARGEST_DRIFT = 0.05
_SAME_START = 1e-3


@dataclass(frozen=True)
class MixtureRuns:
    """Losses of runs from one model with several shares of domain data, float64 [points]. Tokens are those since the start, more than 0."""

    share: np.ndarray
    tokens: np.ndarray
    general: np.ndarray
    domain: np.ndarray
    run: np.ndarray
    """Number of the run, int64 [points]."""
    start: float
    """General loss before the first step."""

    @classmethod
    def of(cls, rows: Sequence[tuple[float, float, float, float, int]], start: float) -> "MixtureRuns":
        """From (share, tokens, general loss, domain loss, run) after the start."""
        share, tokens, general, domain, run = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
        return cls(share, tokens, general, domain, run.astype(np.int64), start)

    def points(self, kind: str, from_tokens: float) -> Points:
        """What the law of the ``general`` or ``domain`` loss is fitted to: losses after at least ``from_tokens``.

        Runs without domain data are left out of the domain's law, which is a power law of its share.
        """
        loss = self.general if kind == "general" else self.domain
        kept = (self.tokens >= from_tokens) & ((self.share > 0) | (kind == "general"))
        return Points(self.share[kept], self.tokens[kept], loss[kept], self.run[kept])


def read_mixture_runs(directories: Sequence[Path], general: Collection[str], domain: Collection[str]) -> MixtureRuns:
    """Losses of run directories at their evaluations.

    The share is that of the tokens of the sources ``domain`` among those that the run has trained on.

    Args:
        directories: of runs that began from one model.
        general: sources that the general loss is the mean of, by evaluated tokens.
        domain: sources of the domain loss, and of the domain's training data.

    Raises:
        DataError: a run has no evaluation before its first step or none of a source, its share changed on the way, or the runs began
            from models with different general losses.
    """
    rows, starts = [], {}
    for number, directory in enumerate(directories):
        run = read_run(directory)
        share, steps = _share(run, domain), sorted({record.step for record in run.evals})
        if not steps or steps[0] != run.starts[0].step:
            raise DataError(f"{directory / 'metrics.jsonl'}: no evaluation before step {run.starts[0].step + 1}, the first of the run")
        begin = next(record.tokens for record in run.evals if record.step == steps[0])
        starts[directory] = _loss(run, steps[0], general)
        for step in steps[1:]:
            tokens = next(record.tokens for record in run.evals if record.step == step) - begin
            rows.append((share, tokens, _loss(run, step, general), _loss(run, step, domain), number))
    if not rows:
        raise DataError(f"{directories[0] / 'metrics.jsonl'}: no evaluation after the start; set evaluation.every for several of them")
    return MixtureRuns.of(rows, _one_start({str(directory): loss for directory, loss in starts.items()}))


def _share(run: Run, domain: Collection[str]) -> float:
    """Of the run's training tokens, those of the domain."""
    path = run.directory / "metrics.jsonl"
    if len(run.train) < 2:
        raise DataError(f"{path}: {len(run.train)} steps; accepted are at least 2")
    counts = [sum(record.tokens_by_source.get(source, 0) for source in domain) for record in run.train]
    first, half, last = 0, len(run.train) // 2, len(run.train) - 1
    shares = [
        (counts[end] - counts[begin]) / (run.train[end].tokens - run.train[begin].tokens)
        for begin, end in ((first, half), (half, last), (first, last))
        if end > begin
    ]
    if max(shares) - min(shares) > _LARGEST_DRIFT:
        raise DataError(
            f"{path}: {', '.join(sorted(domain))} had {shares[0]:.3f} of the tokens in the first half and {shares[1]:.3f} in the second; "
            "accepted are runs of one mixture"
        )
    return shares[-1]


def _loss(run: Run, step: int, sources: Collection[str]) -> float:
    """Mean over sources at one step, weighted by evaluated tokens."""
    records = {record.source: record for record in run.evals if record.step == step}
    if missing := sorted(set(sources) - records.keys()):
        found = ", ".join(sorted(records)) or "none"
        raise DataError(f"{run.directory / 'metrics.jsonl'}: step {step} has no evaluation of {missing[0]!r}; it has {found}")
    chosen = [records[source] for source in sources]
    loss = float(np.average([record.loss for record in chosen], weights=[max(1, record.eval_tokens) for record in chosen]))
    if not math.isfinite(loss):
        raise DataError(f"{run.directory / 'metrics.jsonl'}: the loss of step {step} is {loss}; leave the run out")
    return loss


def _one_start(starts: dict[str, float]) -> float:
    low, high = min(starts, key=starts.__getitem__), max(starts, key=starts.__getitem__)
    if starts[high] - starts[low] > _SAME_START * starts[low]:
        raise DataError(
            f"{high} begins with a general loss of {starts[high]:.4f}, {low} with {starts[low]:.4f}; accepted are runs from one model"
        )
    return float(np.mean(list(starts.values())))


def read_mixture_table(path: Path) -> MixtureRuns:
    """Losses from a table of comma-separated values with the columns ``COLUMNS``, and ``run`` where a share has several.

    A row with 0 tokens says the general loss before the first step; at least one must.

    Raises:
        DataError: names the file, line and column of what cannot be used.
    """
    rows, starts, runs = [], {}, {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
                raise DataError(f"{path}:1: no column {missing[0]!r}; accepted are {', '.join(COLUMNS)} and, if need be, run")
            for values in reader:
                share, tokens, general, domain = (_number(path, reader.line_num, name, values[name]) for name in COLUMNS)
                run = runs.setdefault(values.get("run") or f"{share}", len(runs))
                if tokens == 0:
                    starts[f"{path}:{reader.line_num}"] = general
                else:
                    rows.append((share, tokens, general, domain, run))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a table: {error}") from None
    if not starts or not rows:
        raise DataError(f"{path}: {len(starts)} rows with 0 tokens and {len(rows)} with more; accepted is at least one of each")
    return MixtureRuns.of(rows, _one_start(starts))


def _number(path: Path, line: int, column: str, text: str | None) -> float:
    accepted = {"share": "a number from 0 to 1", "tokens": "a number, at least 0"}.get(column, "a loss, more than 0")
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    largest = 1.0 if column == "share" else math.inf
    if not 0 <= value <= largest or math.isinf(value) or (column.endswith("loss") and value == 0):
        raise DataError(f"{path}:{line}: {column} is {shown(text)}; accepted: {accepted}")
    return value
