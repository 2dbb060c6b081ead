"""The tool on ledgers that a sampler wrote, whole and with what goes wrong in them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.atomic_io import write_json
from megatron_ext.checkpoint.manifest import read_state, seal
from megatron_ext.config import load_config
from megatron_ext.train.build import prepare
from megatron_ext.train.events import append_event
from megatron_ext.train.ledger import Ledger
from megatron_ext.train.ledger_coverage import binary_pieces
from tests.tools.loading import load_tool
from tests.train.tiny_run import write_run

STEPS = 24


def write_ledger(folder: Path, first: int = 0, rewound: int = 0, **changes: Any) -> Path:
    """The ledger from step ``first`` on of a run that was saved after its last step, without training.

    The checkpoint stands ``rewound`` steps before that in its data.
    """
    config = write_run(folder, logging__ledger=True, **changes)
    mixture = prepare(load_config(config, [])).mixture
    run, tokens = folder / "run", 0
    run.mkdir()
    ledger = Ledger(run, [corpus.name for corpus in mixture.corpora], active=True, trained=True)
    for step in range(STEPS + 1):
        if step == first:
            ledger.begin(first, 0, mixture.state_dict())
        if step == STEPS - rewound:
            data = mixture.state_dict()
        if step < STEPS:
            pieces = mixture.take(256)
            tokens += sum(map(len, pieces))
            if step >= first:
                ledger.write(step + 1, pieces, skipped=step == 8)
    ledger.flush()
    (run / "config.yaml").write_text(config.read_text("utf-8"), "utf-8")
    save(run, STEPS, tokens, data)
    return run


def save(run: Path, step: int, tokens: int, data: dict[str, Any]) -> None:
    """A checkpoint, of which only the state is there."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "trainer_state.json", seal({"step": step, "files": {}, "tokens": tokens, "data": data}))


STAGES = [{"tokens": 1500}, {"sequence_length": 24}]
PARTS = {"data__decomposition": {"smallest": 4, "cycle_tokens": 1536}, "data__sequence_length": 64}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_ledger(tmp_path, data__stages=STAGES)


def main(*arguments: str) -> int:
    return load_tool("check_ledger").main(list(arguments))


def test_a_whole_ledger_adds_up(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(str(run)) == 0
    output = capsys.readouterr().out
    assert "trained on: 23 steps" in output and "skipped: 1 steps" in output and "no problem was found" in output
    for check in ("steps follow each other", "each has the documents", "every document once an epoch", "the newest checkpoint stands"):
        assert f"\nchecked: {check}" in output
    assert "not checked" not in output


def test_pieces_of_documents_are_read_once_an_epoch_of_their_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_ledger(tmp_path, **PARTS)
    assert main(str(run)) == 0
    output = capsys.readouterr().out
    assert "checked: every piece of a document once an epoch of its length" in output and "not checked" not in output
    assert re.search("source prose, pieces of 32 tokens: [1-9][0-9]* epochs complete", output)
    path = run / "ledger/00000000.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    pieces = next(row["documents"]["prose"] for row in rows if len(row.get("documents", {}).get("prose", ())) > 1)
    pieces[1] = pieces[0]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert main(str(run)) == 1 and "read twice in epoch 0 of its length" in capsys.readouterr().out


@given(st.integers(1, 500), st.integers(0, 6), st.integers(0, 6))
def test_pieces_of_a_document_add_up_to_it(length: int, smallest: int, more: int) -> None:
    small, large = 2**smallest, 2 ** (smallest + more)
    pieces = list(binary_pieces(length, small, large))
    assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])] and pieces[-1][1] == length
    sizes = [stop - start for start, stop in pieces]
    assert sizes == sorted(sizes, reverse=True) and all(size & (size - 1) == 0 or size < small for size in sizes)
    assert all(sizes.count(size) == 1 for size in sizes if size < large) and sum(size < small for size in sizes) <= 1


def test_a_ledger_that_begins_later_says_what_it_does_not_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_ledger(tmp_path, first=5, data__stages=STAGES)
    assert main(str(run)) == 0
    output = capsys.readouterr().out
    assert "not checked: every document once an epoch, none left out, none twice: the ledger begins after step 5" in output
    assert f"checked: the newest checkpoint stands where the ledger does: step_{STEPS:08d}, step and place in the data; not" in output
    shutil.rmtree(run / "checkpoints")
    assert main(str(run)) == 0
    assert f"not checked: the newest checkpoint stands where the ledger does: {run / 'checkpoints'} has none" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"fingerprint": "another"}, {"steps": {}}, {"cursors": {"prose": 3}}, {"cursors": {"prose": None}}])
def test_a_beginning_from_which_no_sampler_goes_on_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    path = write_ledger(tmp_path, first=5) / "ledger/00000000.jsonl"
    begin, *rows = map(json.loads, path.read_text("utf-8").splitlines())
    begin["data"] |= change
    path.write_text("".join(json.dumps(row) + "\n" for row in [begin, *rows]), "utf-8")
    assert main(str(tmp_path / "run")) == 2
    assert str(path.parent) in capsys.readouterr().err


def test_a_checkpoint_that_the_ledger_does_not_explain_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_ledger(tmp_path / "rewound", rewound=1, data__stages=STAGES)
    assert main(str(run)) == 1
    assert f"the sampler of the newest checkpoint, of step {STEPS}, stands elsewhere" in capsys.readouterr().out
    run = write_ledger(tmp_path / "ends")
    state = read_state(run / f"checkpoints/step_{STEPS:08d}")
    save(run, STEPS, state["tokens"] - 1, state["data"])
    assert main(str(run)) == 1 and f"{state['tokens']} tokens, the newest checkpoint {state['tokens'] - 1}" in capsys.readouterr().out
    save(run, STEPS, state["tokens"], state["data"])
    path = run / "ledger/00000000.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    assert main(str(run)) == 1
    assert f"the ledger ends after step {STEPS - 2}, the newest checkpoint is of step {STEPS}" in capsys.readouterr().out


def test_a_checkpoint_of_an_earlier_start_that_is_ahead_is_compared_with_no_rows(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, checkpoint = run / "ledger/00000000.jsonl", run / f"checkpoints/step_{STEPS:08d}"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:11]))
    for event, step in (("start", 0), ("save", STEPS), ("restart", 5)):
        append_event(run, event, step=step)
    assert main(str(run)) == 0
    output = capsys.readouterr().out
    went_on = f"{checkpoint} is of step {STEPS}, and the last start, which went on after step 5, has not saved since"
    assert f"not checked: the newest checkpoint stands where the ledger does: {went_on}" in output and "no problem was found" in output
    for event in ("save", "restart"):
        append_event(run, event, step=STEPS)
        assert main(str(run)) == 1, "rows of steps that are in the checkpoint are missing"
        assert f"the ledger ends after step 10, the newest checkpoint is of step {STEPS}" in capsys.readouterr().out


def returns(row: dict[str, Any], *numbers: int) -> list[dict[str, Any]]:
    """Rows of returns to the step of ``row``, from the step behind it."""
    return [{**row, "kind": "passed_over", "rollback": number, "was": row["step"] + 1} for number in numbers]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.pop(5), "follows step 4"),
        (lambda rows: rows[5]["documents"]["prose"].pop(1), "an uninterrupted sampler gives"),
        (lambda rows: rows[5].update(documents=rows[3]["documents"]), "read twice in epoch 0|was due from token"),
        (lambda rows: rows[5]["documents"]["prose"].append([0, 0, 9999]), "the document has|read twice"),
        (lambda rows: rows.insert(6, {**returns(rows[5], 0)[0], "was": 9}), "step 9 was passed over behind step 5"),
        (lambda rows: rows.__setitem__(slice(6, 6), returns(rows[5], 0, 3)), "step 6 was passed over by return 3, which follows return 0"),
    ],
)
def test_what_is_wrong_is_found(run: Path, capsys: pytest.CaptureFixture[str], change: object, message: str) -> None:
    path = run / "ledger/00000000.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    change(rows)  # type: ignore[operator]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert main(str(run)) == 1
    assert re.search(message, capsys.readouterr().out)


def test_a_run_without_a_ledger_is_told_how_to_get_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "ledger/00000000.jsonl").unlink()
    assert main(str(run)) == 2 and "logging.ledger=true" in capsys.readouterr().err
