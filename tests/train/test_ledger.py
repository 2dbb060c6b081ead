"""What a ledger keeps and drops when a run goes on from somewhere."""

import re
from pathlib import Path

import pytest

from megatron_ext.data.corpus import Piece
from megatron_ext.errors import DataError
from megatron_ext.train.ledger import STEPS_PER_FILE, Ledger, read_ledger

PIECES = [Piece(1, 5, 0, 32, True), Piece(0, 3, 8, 20, False), Piece(1, 5, 32, 40, False)]


def written(run_dir: Path, first: int, last: int, rollbacks: int = 0, trained: bool = True, active: bool = True) -> list[tuple[int, str]]:
    """Go on from step ``first`` to ``last``; the rows that are there then."""
    ledger = Ledger(run_dir, ["prose", "code"], active, trained)
    ledger.begin(first, rollbacks, {"position": first})
    for step in range(first + 1, last + 1):
        ledger.write(step, PIECES, skipped=step % 5 == 0)
    ledger.flush()
    return [(row["step"], row["kind"]) for row in read_ledger(run_dir)]


def test_rows_name_documents_by_source_in_their_order(tmp_path: Path) -> None:
    written(tmp_path, 0, 1)
    begin, row = read_ledger(tmp_path)
    assert begin == {"step": 0, "kind": "begin", "data": {"position": 0}}
    assert row == {"step": 1, "kind": "trained", "documents": {"code": [[5, 0, 32], [5, 32, 40]], "prose": [[3, 8, 20]]}}


def test_rows_of_steps_that_are_computed_again_are_dropped_across_files(tmp_path: Path) -> None:
    kinds = ["skipped" if step % 5 == 0 else "trained" for step in range(1, STEPS_PER_FILE + 21)]
    whole = [(0, "begin"), *enumerate(kinds, 1)]
    assert written(tmp_path, 0, STEPS_PER_FILE + 20) == whole and len(list((tmp_path / "ledger").iterdir())) == 2
    with open(tmp_path / "ledger" / f"{STEPS_PER_FILE:08d}.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 10')
    for back_to in (STEPS_PER_FILE + 3, STEPS_PER_FILE, STEPS_PER_FILE - 1, 7):
        assert written(tmp_path, back_to, STEPS_PER_FILE + 20) == whole
    assert written(tmp_path, 0, 2) == whole[:3], "a run from the beginning begins the ledger"


def test_a_return_that_was_cut_short_is_written_again(tmp_path: Path) -> None:
    written(tmp_path, 0, 4)
    ledger = Ledger(tmp_path, ["prose", "code"], active=True, trained=True)
    ledger.begin(3, 0, {})
    ledger.pass_over(3, 0, 4, PIECES)
    ledger.flush()
    assert written(tmp_path, 3, 3)[-1] == (3, "trained"), "the checkpoint does not say that the run went back"
    ledger.begin(3, 0, {})
    ledger.pass_over(3, 0, 4, PIECES)
    ledger.flush()
    assert written(tmp_path, 3, 3, rollbacks=1)[-1] == (3, "passed_over")


def test_without_the_option_only_what_was_not_learned_from_is_written(tmp_path: Path) -> None:
    assert written(tmp_path / "never", 0, 4, active=False) == []
    (tmp_path / "some").mkdir()
    assert written(tmp_path / "some", 0, 4, trained=False) == [] and not (tmp_path / "some/ledger").exists()
    assert written(tmp_path / "some", 0, 11, trained=False) == [(5, "skipped"), (10, "skipped")]


def test_a_ledger_that_begins_later_says_where_the_sampler_stood(tmp_path: Path) -> None:
    written(tmp_path, 0, 11, trained=False)
    assert written(tmp_path, 11, 13) == [(5, "skipped"), (10, "skipped"), (11, "begin"), (12, "trained"), (13, "trained")]


SPOILT = [
    b"{oops}",
    b"[]",
    b"\xff",
    b'{"step": 2}',
    b'{"step": 2, "kind": "begin", "data": 3}',
    b'{"step": 2, "kind": "trained", "documents": {"code": [[1, 2]]}}',
    b'{"step": 2, "kind": "trained", "documents": {"code": [[1, 2, -3]]}}',
    b'{"step": 2, "kind": "trained", "documents": [3]}',
    b'{"step": true, "kind": "trained", "documents": {}}',
    b'{"step": 2, "kind": "read", "documents": {}}',
    b'{"step": 2, "kind": "passed_over", "documents": {}}',
]


@pytest.mark.parametrize("line", SPOILT)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: bytes) -> None:
    written(tmp_path, 0, 2)
    path = tmp_path / "ledger/00000000.jsonl"
    first, second, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, second, line + b"\n", *rest]))
    for read in (lambda: list(read_ledger(tmp_path)), lambda: written(tmp_path, 2, 3)):
        with pytest.raises(DataError, match=re.escape(f"{path}:3: no row of a ledger")):
            read()
