"""Proves by its ledger that a run read every document once an epoch, whatever happened to it on the way."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.config import RunConfig
from megatron_ext.data.corpus import Corpus
from megatron_ext.data.sampler import Sampler
from megatron_ext.errors import DataError
from megatron_ext.train.ledger import FOLDER, by_source, read_ledger
from megatron_ext.train.sources import build_mixture

MOST_PROBLEMS = 20
Row = dict[str, Any]


@dataclass
class LedgerReport:
    """What a ledger says. ``tokens`` and ``rows``, of steps, by the kind of the row; ``epochs`` that are complete, by source."""

    rows: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    epochs: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """Empty if every document was read exactly once in every epoch and in the order of the run; the first ``MOST_PROBLEMS``."""


def check_ledger(run_dir: Path, config: RunConfig) -> LedgerReport:
    """Check the ledger of a run from where it begins.

    Three checks, independent of each other: steps follow each other without gap, also where the run went back; the documents of each step
    are those that a sampler gives that was never interrupted; and, without a sampler, by source every document that is not held out is
    read from its first token to its last before any is read again. ``data.decomposition`` reads parts of documents: there the first two
    checks count. Documents of skipped and passed over steps are read, and their rows say that nothing was learned from them.

    Raises:
        DataError: there is no ledger, or it has rows of skipped steps only.
    """
    rows = read_ledger(run_dir)
    first = next((row for row in rows if row["kind"] == "begin"), None)
    if first is None:
        raise DataError(f"{run_dir / FOLDER}: no ledger of all steps; a run with logging.ledger=true writes one")
    report = LedgerReport()
    corpora = build_mixture(config).corpora
    whole = first["step"] == 0 and config.data.decomposition is None
    coverage = {corpus.name: _Coverage(corpus) for corpus in corpora} if whole else {}
    order, steps = _Order(build_mixture(config), config.data.tokens_per_step, first), _Steps(first["step"])
    for row in rows:
        report.problems += [*steps.problems(row), *order.problems(row), *_problems_of_sources(coverage, row)]
        report.rows[row["kind"]] += 1
        report.tokens[row["kind"]] += sum(stop - start for pieces in row.get("documents", {}).values() for _, start, stop in pieces)
        if len(report.problems) >= MOST_PROBLEMS:
            break
    report.epochs = {name: each.epochs for name, each in coverage.items()}
    del report.problems[MOST_PROBLEMS:]
    return report


class _Steps:
    """Steps follow each other; those behind which the run went back are named one by one."""

    def __init__(self, step: int) -> None:
        self._step, self._was = step, step

    def problems(self, row: Row) -> Iterator[str]:
        """What is wrong with the numbers of a row."""
        if row["kind"] == "passed_over":
            self._was += 1
            if (row["step"], row["was"]) != (self._step, self._was):
                yield f"step {row['was']} was passed over behind step {row['step']}; expected is {self._was} behind {self._step}"
                self._step, self._was = row["step"], row["was"]
            return
        if row["kind"] == "begin" or row["step"] != self._step + 1:
            yield f"a row of kind {row['kind']} and step {row['step']} follows step {self._step}"
        self._step = self._was = row["step"]


class _Order:
    """The documents of steps are those of a sampler that goes on from one to the next; what differs is told once."""

    def __init__(self, sampler: Sampler, tokens_per_step: int, begin: Row) -> None:
        self._sampler, self._tokens_per_step, self._differs = sampler, tokens_per_step, False
        if begin["step"] > 0:
            sampler.load_state_dict(begin["data"])

    def problems(self, row: Row) -> Iterator[str]:
        """Whether a row has other documents than the sampler gives next."""
        if self._differs or row["kind"] == "begin":
            return
        expected = by_source(self._sampler.take(self._tokens_per_step), [corpus.name for corpus in self._sampler.corpora])
        for name in sorted(expected.keys() | row["documents"].keys()):
            mine, theirs = row["documents"].get(name, []), expected.get(name, [])
            if mine != theirs:
                self._differs = True
                at = next((n for n, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
                yield (
                    f"step {row.get('was', row['step'])} ({row['kind']}) has {mine[at : at + 1]} as piece {at} of source {name!r}; an "
                    f"uninterrupted sampler gives {theirs[at : at + 1]} (document, first token, end)"
                )
                return


class _Coverage:
    """Of a source, by the lengths of its documents alone: each is read whole, and no other way than once, before the next epoch."""

    def __init__(self, corpus: Corpus) -> None:
        self._name = corpus.name
        documents, lengths = corpus.training_lengths()
        trained = ((int(d), int(n)) for d, n in zip(documents, lengths, strict=True) if n > 0 and not corpus.is_held_out(int(d)))
        self._lengths = dict(trained)
        self._unread = set(self._lengths)
        self._open: tuple[int, int] | None = None
        """A document that was read in part, and its next token."""
        self.epochs = 0

    def problems(self, pieces: Iterable[list[int]]) -> Iterator[str]:
        """What is wrong with the next pieces."""
        for document, start, stop in pieces:
            what = f"source {self._name!r}, document {document}, tokens {start} to {stop}"
            if self._open is not None and self._open != (document, start):
                yield f"{what}: read when document {self._open[0]} was due from token {self._open[1]} on"
            elif self._open is None and document not in self._unread:
                why = f"read twice in epoch {self.epochs}" if document in self._lengths else "not a document to train on"
                yield f"{what}: {why}, before {len(self._unread)} others were read"
            elif self._open is None and start > 0:
                yield f"{what}: its first {start} tokens were not read"
            elif stop > self._lengths.get(document, 0):
                yield f"{what}: the document has {self._lengths.get(document, 0)} tokens"
            self._open = (document, stop) if stop < self._lengths.get(document, 0) else None
            if self._open is None:
                self._unread.discard(document)
            if not self._unread:
                self._unread, self.epochs = set(self._lengths), self.epochs + 1


def _problems_of_sources(coverage: dict[str, _Coverage], row: Row) -> Iterator[str]:
    for name, pieces in row.get("documents", {}).items():
        if name in coverage:
            yield from coverage[name].problems(pieces)
