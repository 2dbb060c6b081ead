"""The tool on ledgers that a sampler wrote, whole and with what goes wrong in them."""

import json
from pathlib import Path

import pytest

from megatron_ext.config import load_config
from megatron_ext.train.build import prepare
from megatron_ext.train.ledger import Ledger
from tests.tools.loading import load_tool
from tests.train.tiny_run import write_run

STEPS = 24


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The ledger of a run of which nothing else is left, without training."""
    config = write_run(tmp_path, data__stages=[{"tokens": 1500}, {"sequence_length": 24}], logging__ledger=True)
    mixture = prepare(load_config(config, [])).mixture
    folder = tmp_path / "run"
    folder.mkdir()
    ledger = Ledger(folder, [corpus.name for corpus in mixture.corpora], active=True, trained=True)
    ledger.begin(0, 0, mixture.state_dict())
    for step in range(1, STEPS + 1):
        ledger.write(step, mixture.take(256), skipped=step == 9)
    ledger.flush()
    (folder / "config.yaml").write_text(config.read_text("utf-8"), "utf-8")
    return folder


def main(*arguments: str) -> int:
    return load_tool("check_ledger").main(list(arguments))


def test_a_whole_ledger_adds_up(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(str(run)) == 0
    output = capsys.readouterr().out
    assert "trained on: 23 steps" in output and "skipped: 1 steps" in output and "every document once an epoch" in output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.pop(5), "follows step 4"),
        (lambda rows: rows[5]["documents"]["prose"].pop(1), "an uninterrupted sampler gives"),
        (lambda rows: rows[5].update(documents=rows[3]["documents"]), "read twice in epoch 0|was due from token"),
        (lambda rows: rows[5]["documents"]["prose"].append([0, 0, 9999]), "the document has|read twice"),
        (lambda rows: rows.insert(6, {**rows[5], "kind": "passed_over", "rollback": 0, "was": 9}), "step 9 was passed over behind step 5"),
    ],
)
def test_what_is_wrong_is_found(run: Path, capsys: pytest.CaptureFixture[str], change: object, message: str) -> None:
    import re

    path = run / "ledger/00000000.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    change(rows)  # type: ignore[operator]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert main(str(run)) == 1
    assert re.search(message, capsys.readouterr().out)


def test_a_run_without_a_ledger_is_told_how_to_get_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "ledger/00000000.jsonl").unlink()
    assert main(str(run)) == 2 and "logging.ledger=true" in capsys.readouterr().err
