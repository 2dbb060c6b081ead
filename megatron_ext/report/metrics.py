"""Reads what a run wrote about itself: ``config.yaml``, ``metrics.jsonl`` and ``events.jsonl``."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_ext.errors import DataError
from megatron_ext.report.events import read_events, standing
from megatron_ext.report.lines import parse_lines, read_lines
from megatron_ext.report.records import (
    EvalRecord,
    EventRecord,
    NeedleRecord,
    PlanRecord,
    ProbeRecord,
    Record,
    StartRecord,
    TrainRecord,
)


@dataclass(frozen=True, eq=False)
class Run:
    """What one run directory says, each list in the order of its steps."""

    directory: Path
    config: dict[str, Any]
    starts: list[StartRecord]
    train: list[TrainRecord]
    evals: list[EvalRecord]
    needles: list[NeedleRecord]
    events: list[EventRecord]
    """All that happened, in that order, also what a later start undid."""
    plans: list[PlanRecord]
    probes: list[ProbeRecord]
    seconds: float
    """Time between each start and the last record that followed it, summed over starts."""
    torn: bool
    """The last line of metrics.jsonl was cut off while it was written, and is not in the lists."""

    @property
    def name(self) -> str:
        """Name that the run gave itself."""
        return self.starts[-1].run

    @cached_property
    def tokens(self) -> int:
        """Training tokens of the whole run."""
        return max((record.tokens for record in [*self.train, *self.evals]), default=0)

    @cached_property
    def unigram_entropy(self) -> dict[str, float]:
        """Entropy of each source's token frequencies, in nats per token; a later start wins."""
        return {source: value for start in self.starts for source, value in start.unigram_entropy.items()}

    @cached_property
    def sources(self) -> list[str]:
        """Every source trained or evaluated on, in order of first appearance."""
        trained = (source for record in self.train for source in record.tokens_by_source or record.loss_by_source)
        return list(dict.fromkeys([*trained, *(record.source for record in self.evals)]))

    @cached_property
    def tokens_by_source(self) -> dict[str, int]:
        """Training tokens of the whole run by source."""
        return {source: tokens for record in self.train for source, tokens in record.tokens_by_source.items()}

    @cached_property
    def epochs(self) -> dict[str, float]:
        """How often the run has read each source, by the last record that says so."""
        return {source: value for record in self.train for source, value in record.epochs.items()}

    @cached_property
    def length_histogram(self) -> dict[int, int]:
        """Documents of the run with a length in (key/2, key] tokens, by increasing key."""
        totals: dict[int, int] = {}
        for record in self.train:
            for key, documents in record.length_histogram.items():
                totals[int(key)] = totals.get(int(key), 0) + documents
        return dict(sorted(totals.items()))

    @cached_property
    def skipped(self) -> list[int]:
        """Steps whose update was left out, because of an event or because the counter of skipped steps grew."""
        steps = {event.step for event in standing(self.events) if event.event == "skip"}
        counters = [0, *(record.skipped_steps for record in self.train)]
        steps |= {self.train[i].step for i in range(len(self.train)) if counters[i + 1] > counters[i]}
        return sorted(steps)

    def column(self, name: str) -> np.ndarray:
        """Values of one field of the train records, float64 [steps]."""
        return np.array([getattr(record, name) for record in self.train], dtype=np.float64)


def read_run(directory: str | Path) -> Run:
    """Read a run directory.

    A last line that was cut off is left out and noted in ``Run.torn``. After a resume at step S, records of later steps that the
    earlier attempt left behind no longer count, and a record of the same step replaces the earlier one; events all stay.

    Raises:
        DataError: the directory, config.yaml or metrics.jsonl is missing, or a line is not a record; names the file and line.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"{directory}: no such run directory; expected a directory with config.yaml and metrics.jsonl")
    lines, torn = read_lines(directory / "metrics.jsonl")
    records = list(parse_lines(lines, directory / "metrics.jsonl"))
    if not records or not isinstance(records[0], StartRecord):
        raise DataError(f"{directory / 'metrics.jsonl'}:1: the first record must be of kind 'start'")
    train: dict[int, TrainRecord] = {}
    evals: dict[tuple[int, str, str], EvalRecord] = {}
    needles: dict[int, NeedleRecord] = {}
    events: list[EventRecord] = []
    plans: dict[int, PlanRecord] = {}
    probes: dict[int, ProbeRecord] = {}
    for record in records:
        match record:
            case StartRecord():
                train = {step: old for step, old in train.items() if step <= record.step}
                evals = {key: old for key, old in evals.items() if old.step <= record.step}
                needles = {step: old for step, old in needles.items() if step <= record.step}
                events = [old for old in events if old.step <= record.step]
                plans = {step: old for step, old in plans.items() if step <= record.step}
                probes = {step: old for step, old in probes.items() if step <= record.step}
            case TrainRecord():
                train[record.step] = record
            case EvalRecord():
                evals[record.step, record.source, record.split] = record
            case NeedleRecord():
                needles[record.step] = record
            case EventRecord():
                events.append(record)
            case PlanRecord():
                plans[record.step] = record
            case ProbeRecord():
                probes[record.step] = record
    return Run(
        directory=directory,
        config=_read_config(directory / "config.yaml"),
        starts=[record for record in records if isinstance(record, StartRecord)],
        train=sorted(train.values(), key=lambda record: record.step),
        evals=sorted(evals.values(), key=lambda record: record.step),
        needles=sorted(needles.values(), key=lambda record: record.step),
        events=events + read_events(directory),
        plans=sorted(plans.values(), key=lambda record: record.step),
        probes=sorted(probes.values(), key=lambda record: record.step),
        seconds=_active_seconds(records),
        torn=torn,
    )


def read_evaluations(path: Path) -> list[EvalRecord]:
    """The eval records of a metrics.jsonl that is being written, in their order. Raises DataError as ``read_run``."""
    lines, _ = read_lines(path)
    return [record for record in parse_lines([line for line in lines if b'"eval"' in line], path) if isinstance(record, EvalRecord)]


def _active_seconds(records: list[Record]) -> float:
    """Sum over starts of the time to the last record before the next start."""
    total, begin, end = 0.0, math.nan, math.nan
    for record in records:
        if isinstance(record, StartRecord):
            total += 0.0 if math.isnan(begin) else end - begin
            begin = end = record.time
        elif not math.isnan(record.time):
            end = record.time
    return total + end - begin


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; a run directory holds its resolved config there") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: not a YAML file: {error}") from None
    except RecursionError:
        raise DataError(f"{path}: nested too deeply") from None
    if not isinstance(config, dict):
        raise DataError(f"{path}: expected a mapping of keys to values, found {type(config).__name__}")
    return config
