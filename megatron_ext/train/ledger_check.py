"""Proves by its ledger that a run read every document once an epoch, whatever happened to it on the way."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.directory import latest
from megatron_ext.checkpoint.manifest import read_state
from megatron_ext.config import RunConfig
from megatron_ext.data.sampler import Sampler
from megatron_ext.errors import CheckpointError, DataError
from megatron_ext.report.events import STARTS, read_events
from megatron_ext.train.ledger import FOLDER, Row, by_source, read_ledger
from megatron_ext.train.ledger_coverage import Coverage, Decomposed, WholeDocuments
from megatron_ext.train.sources import build_mixture
from megatron_ext.train.trainer import CHECKPOINTS

MOST_PROBLEMS = 20


@dataclass
class LedgerReport:
    """What a ledger says. ``tokens`` and ``rows``, of steps, by the kind of the row; ``epochs`` that are complete, by source."""

    rows: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    epochs: dict[str, int] = field(default_factory=dict)
    checked: list[str] = field(default_factory=list)
    """What holds, if there are no problems."""
    unchecked: list[str] = field(default_factory=list)
    """What was not looked at, and why."""
    problems: list[str] = field(default_factory=list)
    """The first ``MOST_PROBLEMS``; empty if all that was checked holds."""


def check_ledger(run_dir: Path, config: RunConfig) -> LedgerReport:
    """Check the ledger of a run from where it begins.

    Four checks, independent of each other: steps follow each other without gap, also where the run went back; the documents of each step
    are those that a sampler gives that was never interrupted; without a sampler, by source every document that is not held out is read from
    its first token to its last before any is read again (with ``data.decomposition``, every piece before any of its length is); and the
    newest checkpoint, if the last start saved it or went on from it, has the tokens of the rows up to its step, and stands where they end.
    Documents of skipped and passed over steps are read, and their rows say that nothing was learned from them.

    Raises:
        DataError: there is no ledger, it has rows of skipped steps only, or a line is no row of one, or no event in events.jsonl.
    """
    rows = read_ledger(run_dir)
    first = next((row for row in rows if row["kind"] == "begin"), None)
    if first is None:
        raise DataError(f"{run_dir / FOLDER}: no ledger of all steps; a run with logging.ledger=true writes one")
    report = LedgerReport(checked=["steps follow each other without gap", "each has the documents that an uninterrupted sampler gives"])
    sampler = build_mixture(config)
    coverage = _coverage(sampler, config, first["step"], report)
    steps, order = _Steps(first["step"]), _Order(sampler, config.data.tokens_per_step, first, run_dir / FOLDER)
    newest = _newest(run_dir, first["step"], report)
    saved = None if newest is None else _Saved(newest, first["step"], order)
    for row in rows:
        report.problems += [*steps.problems(row), *order.problems(row), *_problems_of_sources(coverage, row)]
        report.rows[row["kind"]] += 1
        report.tokens[row["kind"]] += sum(stop - start for pieces in row.get("documents", {}).values() for _, start, stop in pieces)
        if saved is not None:
            saved.look(row)
        if len(report.problems) >= MOST_PROBLEMS:
            break
    else:
        report.problems += saved.problems(steps.last) if saved is not None else []
    report.epochs = {what: epochs for each in coverage.values() for what, epochs in each.epochs().items()}
    del report.problems[MOST_PROBLEMS:]
    return report


def _coverage(sampler: Sampler, config: RunConfig, begin: int, report: LedgerReport) -> dict[str, Coverage]:
    """What watches each source, by name, as far as it can be watched."""
    parts = config.data.decomposition
    what = "every document once an epoch" if parts is None else "every piece of a document once an epoch of its length"
    what += ", none left out, none twice"
    if begin > 0:
        report.unchecked.append(f"{what}: the ledger begins after step {begin}")
        return {}
    report.checked.append(what)
    if parts is None:
        return {corpus.name: WholeDocuments(corpus) for corpus in sampler.corpora}
    return {corpus.name: Decomposed(corpus, parts.smallest, config.data.sequence_length) for corpus in sampler.corpora}


def _newest(run_dir: Path, begin: int, report: LedgerReport) -> dict[str, Any] | None:
    """The state of the newest checkpoint, if the rows can be compared with it."""
    what, root = "the newest checkpoint stands where the ledger does", run_dir / CHECKPOINTS
    try:
        path = latest(root)
        state = None if path is None else read_state(path)
    except CheckpointError as error:
        report.unchecked.append(f"{what}: {error}")
        return None
    if state is None or path is None:
        report.unchecked.append(f"{what}: {root} has none")
    elif state["step"] < begin:
        report.unchecked.append(f"{what}: {path} is of step {state['step']}, and the ledger begins after step {begin}")
    elif (started := _unsaved_start(run_dir)) is not None and started < state["step"]:
        report.unchecked.append(
            f"{what}: {path} is of step {state['step']}, and the last start, which went on after step {started}, has not saved since"
        )
    else:
        compared = (
            "step, place in the data and tokens" if begin == 0 else "step and place in the data; not its tokens, the ledger began later"
        )
        report.checked.append(f"the newest checkpoint stands where the ledger does: {path.name}, {compared}")
        return state
    return None


def _unsaved_start(run_dir: Path) -> int | None:
    """The step after which the last start went on, if no checkpoint was saved since: the rows are its own, the newest checkpoint is not."""
    told = next((event for event in reversed(read_events(run_dir)) if event.event in (*STARTS, "save")), None)
    return None if told is None or told.event == "save" else told.step


class _Steps:
    """Steps follow each other; those behind which the run went back are named one by one, from the first one again each time."""

    def __init__(self, step: int) -> None:
        self.last, self._was = step, step
        self._rollback: int | None = None

    def problems(self, row: Row) -> Iterator[str]:
        """What is wrong with the numbers of a row."""
        if row["kind"] == "passed_over":
            yield from self._passed_over(row)
            return
        if row["kind"] == "begin" or row["step"] != self.last + 1:
            yield f"a row of kind {row['kind']} and step {row['step']} follows step {self.last}"
        self.last = self._was = row["step"]

    def _passed_over(self, row: Row) -> Iterator[str]:
        before, self._rollback = self._rollback, row["rollback"]
        if self._rollback != before:
            self._was = self.last
            if before is not None and self._rollback != before + 1:
                yield f"step {row['was']} was passed over by return {self._rollback}, which follows return {before}"
        self._was += 1
        if (row["step"], row["was"]) != (self.last, self._was):
            yield f"step {row['was']} was passed over behind step {row['step']}; expected is {self._was} behind {self.last}"
            self.last, self._was = row["step"], row["was"]


class _Order:
    """The documents of steps are those of a sampler that goes on from one to the next; what differs is told once.

    Args:
        sampler: at its beginning.
        tokens_per_step: of the run.
        begin: the row with which the ledger begins.
        place: of the ledger, for errors.

    Raises:
        DataError: the row has no state that this sampler goes on from.
    """

    def __init__(self, sampler: Sampler, tokens_per_step: int, begin: Row, place: Path) -> None:
        self._sampler, self._tokens_per_step = sampler, tokens_per_step
        self.differs, self.tokens = False, 0
        """``tokens`` that steps were trained on or skipped with, those of metadata among them, from the first row on."""
        if begin["step"] > 0:
            try:
                sampler.load_state_dict(begin["data"])
                sampler.copy().take(tokens_per_step)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise DataError(f"{place}: from the row of kind 'begin' no sampler goes on: {type(error).__name__} {error}") from error

    def data(self) -> dict[str, Any]:
        """Where the sampler stands."""
        return self._sampler.state_dict()

    def problems(self, row: Row) -> Iterator[str]:
        """Whether a row has other documents than the sampler gives next."""
        if self.differs or row["kind"] == "begin":
            return
        pieces = self._sampler.take(self._tokens_per_step)
        self.tokens += sum(map(len, pieces)) if row["kind"] != "passed_over" else 0
        expected = by_source(pieces, [corpus.name for corpus in self._sampler.corpora])
        for name in sorted(expected.keys() | row["documents"].keys()):
            mine, theirs = row["documents"].get(name, []), expected.get(name, [])
            if mine != theirs:
                self.differs = True
                at = next((n for n, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
                yield (
                    f"step {row.get('was', row['step'])} ({row['kind']}) has {mine[at : at + 1]} as piece {at} of source {name!r}; an "
                    f"uninterrupted sampler gives {theirs[at : at + 1]} (document, first token, end)"
                )
                return


class _Saved:
    """The newest checkpoint against the rows up to its step, and the returns that it knows of: a kill may leave a row of one more."""

    def __init__(self, state: Mapping[str, Any], begin: int, order: _Order) -> None:
        self._step, self._tokens, self._data = state["step"], state.get("tokens"), state.get("data")
        self._rollbacks = state.get("guard", {}).get("rollbacks", 0)
        self._from_the_beginning, self._order = begin == 0, order
        self._seen_tokens, self._seen_data = order.tokens, order.data()

    def look(self, row: Row) -> None:
        """After the order of a row was looked at."""
        if row["step"] <= self._step and row.get("rollback", -1) < self._rollbacks:
            self._seen_tokens = self._order.tokens
            if row["step"] == self._step:
                self._seen_data = self._order.data()

    def problems(self, last: int) -> Iterator[str]:
        """What differs, after all rows; ``last`` is the step of the last one."""
        if last < self._step:
            yield f"the ledger ends after step {last}, the newest checkpoint is of step {self._step}"
        elif not self._order.differs:
            if self._from_the_beginning and self._seen_tokens != self._tokens:
                yield f"up to step {self._step} the ledger has {self._seen_tokens} tokens, the newest checkpoint {self._tokens}"
            if self._seen_data != self._data:
                yield f"the sampler of the newest checkpoint, of step {self._step}, stands elsewhere than the ledger ends"


def _problems_of_sources(coverage: Mapping[str, Coverage], row: Row) -> Iterator[str]:
    for name, pieces in row.get("documents", {}).items():
        if name in coverage:
            yield from coverage[name].problems(pieces)
