"""Killed at any moment of training and of saving, a run has a whole checkpoint, and goes on as if nothing had been."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint.load import find_checkpoint, verify
from megatron_ext.config import load_config
from megatron_ext.train.ledger_check import check_ledger
from tests.grids import ALONE
from tests.train.kills import Moment, live
from tests.train.tiny_run import losses, master_weights, write_run

STEPS = 30
SMALL = {
    "train__steps": STEPS,
    "checkpoint__every": 3,
    "planning__ahead": 0,
    "data__tokens_per_step": 64,
    "evaluation__tokens": 64,
    "model__hidden_size": 16,
    "model__intermediate_size": 16,
    "logging__ledger": True,
}
MOST_CALLS = 450
"""Of a start of the run, a few saves and the steps between them."""
MOST_SECONDS = 2.0


def whole_losses(run_dir: Path) -> dict[int, float]:
    """Training losses by step; a last line that was cut off does not count."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


def assert_whole(folder: Path, before: int) -> int:
    """The checkpoint that the run would resume from is whole, and no older than the one before; returns its step, 0 if there is none."""
    path = find_checkpoint(folder / "run" / "checkpoints", "auto")
    step = 0 if path is None else verify(path, ALONE)["step"]
    assert step >= before
    return step


def assert_same_end(folder: Path, reference: Path) -> None:
    """Losses, masters and moments bit for bit, and the exported model byte for byte; a ledger that adds up."""
    report = check_ledger(folder / "run", load_config(folder / "run" / "config.yaml", []))
    assert (report.problems, report.unchecked, report.rows) == ([], [], {"trained": STEPS})
    assert losses(folder / "run") == losses(reference / "run")
    last = [each / "run" / "checkpoints" / f"step_{STEPS:08d}" for each in (folder, reference)]
    seen, expected = map(master_weights, last)
    assert seen.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in seen.items())
    assert len({(path / "model.safetensors").read_bytes() for path in last}) == 1
    kept, newest = {path.name for path in last[0].parent.iterdir()}, {"latest", f"step_{STEPS - 3:08d}", f"step_{STEPS:08d}"}
    # A run that is killed between its last save and what that evicts has nothing more to save when it starts again, and evicts nothing.
    old = f"step_{STEPS - 6:08d}"
    assert newest <= kept and all(name == old or name.startswith(f".{old}.") for name in kept - newest), kept
    assert not list((folder / "run").glob("*lock*")), "neither the lock nor what taking it needed is left"


def survive(folder: Path, reference: Path, config: Path, ranks: int, kills: int, seed: int) -> tuple[Counter[str], int]:
    """Kill the run ``kills`` times, starting it over when it has come to its end; returns what it was doing, and how often it ended."""
    generator, doing, ends, step = random.Random(seed), Counter[str](), 0, 0
    expected = losses(reference / "run")
    while True:
        call = generator.randint(1, MOST_CALLS) if generator.random() < 0.5 else None
        moment = Moment(generator.randrange(ranks), call, generator.uniform(0.001, MOST_SECONDS))
        part = live(config, ranks, folder / "life", moment if doing.total() < kills else None)
        seen = whole_losses(folder / "run")
        assert seen == {number: expected[number] for number in seen}, f"after {doing}, killed at {moment}"
        step = assert_whole(folder, step)
        if part is not None:
            doing[part] += 1
            continue
        assert_same_end(folder, reference)
        ends, step = ends + 1, 0
        if doing.total() == kills:
            return doing, ends
        shutil.rmtree(folder / "run")


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs on one and on two ranks that nobody killed, and that waited for their saves."""
    folders = {ranks: tmp_path_factory.mktemp(f"reference{ranks}") for ranks in (1, 2)}
    for ranks, folder in folders.items():
        assert live(write_run(folder, **SMALL), ranks, folder / "life", None) is None
    return folders


def kill_all_kinds(tmp_path: Path, references: dict[int, Path], kills: tuple[int, int, int], seed: int) -> Counter[str]:
    """Of a rank that waits for its saves, one that does not, and two that do not; prints what was hit."""
    total = Counter[str]()
    for (ranks, asynchronous), count in zip([(1, False), (1, True), (2, True)], kills, strict=True):
        folder = tmp_path / f"{ranks}-{asynchronous}"
        config = write_run(folder, checkpoint__asynchronous=asynchronous, **SMALL)
        doing, ends = survive(folder, references[ranks], config, ranks, count, seed + ranks + 2 * asynchronous)
        print(
            f"ranks {ranks}, asynchronous {asynchronous}, seed {seed}: {count} kills, {ends} runs to their end: {dict(doing.most_common())}"
        )
        for part, number in doing.items():
            total[part.partition(":")[0]] += number
    return total


def test_killed_at_random_a_run_goes_on_with_the_same_losses(tmp_path: Path, references: dict[int, Path]) -> None:
    seed = random.randrange(2**31)
    doing = kill_all_kinds(tmp_path, references, (5, 5, 5), seed)
    assert doing.total() == 15, f"seed {seed}"


@pytest.mark.slow
def test_killed_at_more_than_a_hundred_random_points(tmp_path: Path, references: dict[int, Path]) -> None:
    doing = kill_all_kinds(tmp_path, references, (36, 36, 36), seed=20261121)
    assert doing["saving"] >= 20 and doing["training"] >= 20 and doing.total() == 108, doing


def test_the_comparison_notices_another_run(tmp_path: Path, references: dict[int, Path]) -> None:
    """A run with a slightly other learning rate that is killed once is not taken for the reference."""
    config = write_run(tmp_path, **SMALL, optimizer__lr=0.0100001)
    with pytest.raises(AssertionError):
        survive(tmp_path, references[1], config, 1, 1, seed=1)


def test_a_run_that_fails_is_not_taken_for_one_that_was_killed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no_such_key"):
        live(write_run(tmp_path, no_such_key=1), 1, tmp_path / "life", None)
