"""Going back: a run that went back is the run that resumes from that checkpoint with its sampler moved on, and its ledger adds up."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_ext.checkpoint.amend import amend_state
from megatron_ext.config import load_config
from megatron_ext.data.mixture import Mixture
from megatron_ext.errors import StorageError, TrainingError
from megatron_ext.parallel.world import World
from megatron_ext.report.digests import first_difference, read_digests
from megatron_ext.train.build import prepare
from megatron_ext.train.ledger import read_ledger
from megatron_ext.train.ledger_check import LedgerReport, check_ledger
from megatron_ext.train.record_file import RecordFile
from megatron_ext.train.trainer import Trainer
from tests.distributed import RankError, RunRanks
from tests.train.bad_steps import pieces_of_steps, train_badly
from tests.train.test_skipping import events, same
from tests.train.tiny_run import losses, master_weights, records, train, write_run

BACK = ["train.skip.rollback={skips: 2, within: 3}", "logging.ledger=true", "train.dtype=float64", "checkpoint.keep_last=9"]
DIGESTS = "logging.digests_every=1"
STAGES = [{"tokens": 900}, {"sequence_length": 24, "weights": {"code": 4.0}}]
SKIPPED = (5, 6)
"""Steps of the uninterrupted order whose gradients are spoiled; the run goes back from the second to step 3."""


def state(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((folder / f"run/checkpoints/step_{step:08d}/trainer_state.json").read_text("utf-8"))


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return master_weights(folder / f"run/checkpoints/step_{step:08d}")


def checked(folder: Path) -> LedgerReport:
    return check_ledger(folder / "run", load_config(folder / "config.yaml", BACK))


@pytest.fixture(scope="module")
def went_back(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of nine steps on two ranks that goes back from step 6 to step 3."""
    folder = tmp_path_factory.mktemp("went_back")
    config = write_run(folder, train__steps=9, data__stages=STAGES)
    run_ranks(2, train_badly, config, [*BACK, DIGESTS], pieces_of_steps(config, BACK, *SKIPPED))
    return folder


def copy_of(folder: Path, target: Path, last: int) -> Path:
    """The run as it was when it had saved step ``last``; returns its configuration."""
    config = write_run(target, train__steps=9, data__stages=STAGES)
    shutil.copytree(folder / "run", target / "run")
    for path in (target / "run/checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > last:
            shutil.rmtree(path)
    (target / "run/checkpoints/latest").write_text(f"step_{last:08d}\n", "utf-8")
    return config


def test_it_is_a_resumed_run_whose_sampler_was_moved_on(run_ranks: RunRanks, went_back: Path, tmp_path: Path) -> None:
    straight = write_run(tmp_path / "straight", train__steps=9, data__stages=STAGES)
    run_ranks(2, train, straight, [*BACK, DIGESTS, "train.skip.rollback=null"])
    config = copy_of(tmp_path / "straight", tmp_path / "moved", 3)
    mixture = prepare(load_config(config, BACK)).mixture
    for _ in range(6):
        mixture.take(256)
    amend_state(tmp_path / "moved/run/checkpoints/step_00000003", {"data": mixture.state_dict()})
    run_ranks(2, train, config, [*BACK, DIGESTS])
    assert losses(went_back / "run") == losses(tmp_path / "moved/run")
    one, other = (read_digests(folder / "run") for folder in (went_back, tmp_path / "moved"))
    assert first_difference(one, other) is None and list(one.steps) == list(other.steps) == list(range(1, 10))
    assert same(weights(went_back, 9), weights(tmp_path / "moved", 9)) and not same(
        weights(went_back, 9), weights(tmp_path / "straight", 9)
    )
    for key in ("data", "tokens", "tokens_by_source", "rng", "updates"):
        assert state(went_back, 9)[key] == state(tmp_path / "moved", 9)[key]


def test_the_ledger_adds_up_and_the_event_says_what_was_passed_over(went_back: Path) -> None:
    report = checked(went_back)
    assert report.problems == [] and report.rows == {"trained": 9, "passed_over": 3} and report.epochs["prose"] > 0
    (event,) = events(went_back, "rollback")
    tokens = report.tokens["passed_over"]
    assert (event["step"], event["first_step"], event["last_step"], event["number"]) == (3, 4, 6, 0)
    assert event["end_token"] - event["first_token"] == tokens and [cause["step"] for cause in event["causes"]] == [5, 6]
    assert [record["step"] for record in records(went_back / "run", "train")] == list(range(1, 10))
    assert [record["rollbacks"] for record in records(went_back / "run", "train")] == [0] * 3 + [1] * 6
    assert report.tokens["trained"] == state(went_back, 9)["tokens"]


@pytest.mark.parametrize(("ranks", "grid"), [(2, []), (2, ["parallel.tp=2"]), (1, [])])
def test_a_kill_after_going_back_changes_nothing_on_any_grid(
    run_ranks: RunRanks, went_back: Path, tmp_path: Path, ranks: int, grid: list[str]
) -> None:
    config = write_run(tmp_path, train__steps=9, data__stages=STAGES)
    with pytest.raises(RankError, match="ended without an answer"):
        run_ranks(2, train_badly, config, [*BACK, DIGESTS], pieces_of_steps(config, BACK, *SKIPPED), (), (5, 1))
    digests = read_digests(tmp_path / "run")
    assert (list(digests.steps), list(digests.begins)) == ([1, 2, 3, 4], [0, 3]), "those of steps that it went back behind are gone"
    run_ranks(ranks, train, config, [*BACK, *grid])
    seen, expected = losses(tmp_path / "run"), losses(went_back / "run")
    assert seen == (expected if not grid and ranks == 2 else pytest.approx(expected, rel=1e-10, abs=0))
    report = checked(tmp_path)
    assert report.problems == [] and report.rows == {"trained": 9, "passed_over": 3}
    assert list(read_ledger(tmp_path / "run")) == list(read_ledger(went_back / "run"))


def test_the_ledger_of_a_run_that_goes_back_twice_to_one_checkpoint_adds_up(run_ranks: RunRanks, tmp_path: Path) -> None:
    config, twice = write_run(tmp_path, train__steps=6, data__stages=STAGES), [*BACK, "train.skip.rollback={skips: 1}"]
    run_ranks(1, train_badly, config, twice, pieces_of_steps(config, twice, 4, 5))
    assert [(event["step"], event["number"]) for event in events(tmp_path, "rollback")] == [(3, 0), (3, 1)]
    report = checked(tmp_path)
    assert report.problems == [] and report.rows == {"trained": 6, "passed_over": 2}


def test_it_goes_back_only_so_often(run_ranks: RunRanks, tmp_path: Path) -> None:
    config = write_run(tmp_path, train__steps=9)
    with pytest.raises(RankError, match=f"{TrainingError.__name__}: went back 2 times"):
        run_ranks(1, train_badly, config, ["train.skip.rollback={skips: 1, most: 2}", "checkpoint.every=2"], (), (4, 5))
    assert {event["number"] for event in events(tmp_path, "rollback")} == {0, 1}
    assert [row["kind"] for row in read_ledger(tmp_path / "run")] == ["passed_over"] * 4 + ["skipped"]


def go_back_without(world: World, config: Path, overrides: list[str], name: str) -> str:
    """Train until the run goes back, while records of the file ``name`` cannot be flushed; the error that this rank sees."""
    go_back, flush = Trainer._go_back, RecordFile.flush

    def stuck(self: RecordFile) -> None:
        if self._path.name == name:
            raise StorageError(f"{name} cannot be written")
        flush(self)

    def go_back_stuck(self: Trainer, checkpoint: Path) -> None:
        with mock.patch.object(RecordFile, "flush", stuck):
            go_back(self, checkpoint)

    with mock.patch.object(Trainer, "_go_back", go_back_stuck), pytest.raises(StorageError) as caught:
        train_badly(world, config, overrides, (), (5, 6))
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("metrics.jsonl", "go back"),
        ("digests.jsonl", "go back"),
        ("00000000.jsonl", "go back"),
        ("events.jsonl", "amend the checkpoint"),
    ],
)
def test_the_checkpoint_does_not_say_that_the_run_went_back_while_a_record_of_it_is_not_on_disk(
    run_ranks: RunRanks, tmp_path: Path, name: str, what: str
) -> None:
    config = write_run(tmp_path, train__steps=9)
    assert run_ranks(2, go_back_without, config, [*BACK, DIGESTS], name) == [f"cannot {what}: {name} cannot be written"] * 2
    saved = state(tmp_path, 3)
    assert saved["guard"]["rollbacks"] == 0
    run_ranks(2, train, config, [*BACK, DIGESTS])
    assert checked(tmp_path).problems == []


def forgets(world: World, config: Path, overrides: list[str]) -> None:
    """A sampler that begins anew at every resume."""
    Mixture.load_state_dict = lambda self, state, allow_changed=False: None
    train(world, config, overrides)


def test_no_document_is_lost_or_repeated_across_kills_and_grids(run_ranks: RunRanks, tmp_path: Path) -> None:
    config = write_run(tmp_path / "good", train__steps=20, data__stages=STAGES)
    overrides = [*BACK, "checkpoint.every=4", "evaluation.tokens=64"]
    for ranks, grid, death in ((1, [], 7), (2, [], 14), (2, ["parallel.tp=2"], None)):
        if death is None:
            shutil.copytree(tmp_path / "good", tmp_path / "bad")
            run_ranks(ranks, train, config, [*overrides, *grid])
            run_ranks(1, forgets, write_run(tmp_path / "bad", train__steps=20, data__stages=STAGES), overrides)
        else:
            with pytest.raises(RankError, match="ended without an answer"):
                run_ranks(ranks, train_badly, config, [*overrides, *grid], (), (10,), (death, 0))
    report = checked(tmp_path / "good")
    assert report.problems == [] and report.rows == {"trained": 19, "skipped": 1} and min(report.epochs.values()) > 0
    assert report.tokens["trained"] + report.tokens["skipped"] == state(tmp_path / "good", 20)["tokens"]
    problems = checked(tmp_path / "bad").problems
    assert any("an uninterrupted sampler gives" in problem for problem in problems) and any("epoch" in problem for problem in problems)
