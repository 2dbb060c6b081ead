"""ledger/: which documents the steps of a run read, and which of them its weights have not learned from. Rank 0 writes it.

A file has the rows of ``STEPS_PER_FILE`` steps, a row is a JSON object on a line: ``step``, ``kind``, and ``documents``, by source the
pieces in their order as [document, first token, token behind the last]. Kinds: ``trained``; ``skipped``, whose update was left out;
``passed_over``, read before the run went back to ``step`` (``was``: the step that it was; ``rollback``: which time, from 0 on); ``begin``:
where the sampler stood when the ledger began, in ``data``.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_ext.atomic_io import atomic_open
from megatron_ext.data.corpus import Piece
from megatron_ext.errors import DataError
from megatron_ext.json_text import parse_json
from megatron_ext.train.record_file import RecordFile, storing

FOLDER = "ledger"
STEPS_PER_FILE = 1000
STEP_KINDS = ("trained", "skipped", "passed_over")
Row = dict[str, Any]


class Ledger:
    """Writes the ledger of a run.

    Args:
        run_dir: where the folder lies.
        sources: names of the sources, by number.
        active: False on ranks that do not write.
        trained: write steps that were trained on too, and not only the others.
    """

    def __init__(self, run_dir: Path, sources: Sequence[str], active: bool, trained: bool) -> None:
        self._folder, self._sources = run_dir / FOLDER, list(sources)
        self._active, self._trained = active, trained
        self._written: dict[Path, RecordFile] = {}
        """Files that rows went to since the last flush."""

    def begin(self, step: int, rollbacks: int, data: dict[str, Any]) -> None:
        """Go on after ``step``, when the run has gone back ``rollbacks`` times and the sampler is in the state ``data``.

        Rows of later steps, and those of further times, are dropped: they are written again.
        """
        if not self._active:
            return
        self.flush()
        with storing(self._folder):
            for path in _files(self._folder):
                if step == 0 or int(path.stem) > _begin_of(step):
                    path.unlink()
        kept: list[Row] = []
        if (path := self.path_of(step)).exists():
            kept = [row for row in read_rows(path) if row["step"] <= step and row.get("rollback", -1) < rollbacks]
            with storing(path), atomic_open(path) as file:
                file.writelines(json.dumps(row) + "\n" for row in kept)
        if self._trained and (not kept or kept[-1]["step"] != step):
            self._append({"step": step, "kind": "begin", "data": data})

    def write(self, step: int, pieces: Sequence[Piece], skipped: bool) -> None:
        """Note what a step read."""
        if self._active and (skipped or self._trained):
            self._append({"step": step, "kind": "skipped" if skipped else "trained", "documents": self.documents(pieces)})

    def pass_over(self, step: int, rollback: int, was: int, pieces: Sequence[Piece]) -> None:
        """Note what step ``was`` had read, behind which the run goes back to ``step``, for time number ``rollback`` from 0 on."""
        if self._active:
            place = {"rollback": rollback, "was": was}
            self._append({"step": step, "kind": "passed_over", **place, "documents": self.documents(pieces)})

    def documents(self, pieces: Sequence[Piece]) -> dict[str, list[list[int]]]:
        """Pieces by source, as in a row."""
        return by_source(pieces, self._sources)

    def path_of(self, step: int) -> Path:
        """Where the row of a step is."""
        return self._folder / f"{_begin_of(step):08d}.jsonl"

    def flush(self) -> None:
        """Put on disk what was written, before a checkpoint says that it was done. Raises StorageError if that cannot be."""
        for file in self._written.values():
            file.flush()
        self._written.clear()

    def _append(self, row: Row) -> None:
        path = self.path_of(row["step"])
        self._written.setdefault(path, RecordFile(path)).write(row)


def by_source(pieces: Sequence[Piece], sources: Sequence[str]) -> dict[str, list[list[int]]]:
    """[document, first token, token behind the last] of pieces, by the name of their source."""
    found: dict[str, list[list[int]]] = defaultdict(list)
    for piece in pieces:
        found[sources[piece.source]].append([piece.document, piece.start, piece.stop])
    return dict(found)


def read_ledger(run_dir: Path) -> Iterator[Row]:
    """The rows of a ledger in their order; none if there is no ledger. Raises DataError as ``read_rows``."""
    for path in _files(run_dir / FOLDER):
        yield from read_rows(path)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of one file, without a last one that was cut off while it was written.

    Raises:
        DataError: the file cannot be read, or a line is no row; names the file and the line.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    yield _row(line, f"{path}:{number}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; accepted: a ledger that a run wrote") from error


def _row(line: bytes, place: str) -> Row:
    try:
        row = parse_json(line)
        kind, step = row["kind"], row["step"]
        numbers = [step, *([row["rollback"], row["was"]] if kind == "passed_over" else [])]
        if kind == "begin":
            is_row = isinstance(row["data"], dict)
            numbers += _leaves(row["data"])
        else:
            numbers += [number for pieces in row["documents"].values() for piece in pieces for number in piece]
            is_row = kind in STEP_KINDS and all(len(piece) == 3 for pieces in row["documents"].values() for piece in pieces)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{place}: no row of a ledger: {type(error).__name__} {error}; the line is {line[:80]!r}") from None
    if not is_row or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise DataError(f"{place}: no row of a ledger; accepted: what a run wrote; the line is {line[:80]!r}")
    return row


def _leaves(state: Any) -> Iterator[Any]:
    """What the state of a sampler consists of, but for texts."""
    if isinstance(state, dict):
        for value in state.values():
            yield from _leaves(value)
    elif not isinstance(state, str):
        yield state


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.jsonl") if path.stem.isdecimal() and path.stem.isascii())


def _begin_of(step: int) -> int:
    """First step of the file that has the rows of ``step``."""
    return step - step % STEPS_PER_FILE
