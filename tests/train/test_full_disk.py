"""A run whose disk somebody else fills: what it says, what it keeps, and how it ends."""

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from megatron_ext.checkpoint.directory import latest
from megatron_ext.errors import StorageError
from megatron_ext.parallel.world import World
from megatron_ext.report.events import read_events
from megatron_ext.train.ledger import read_ledger
from megatron_ext.train.rank_log import RankLog
from megatron_ext.train.trainer import Trainer
from tests.distributed import RunRanks
from tests.mounts import fill, mounted
from tests.train.tiny_run import losses, train, write_run

OPTIONS = {"train__steps": 8, "checkpoint__every": 2, "checkpoint__keep_last": 1, "logging__ledger": True, "logging__digests_every": 1}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that has room for the run."""
    with mounted(tmp_path / "disk", "size=4m") as folder:
        yield folder


def train_on_full_disk(world: World, config: Path, disk: Path, first: int, last: int, overrides: list[str]) -> str | None:
    """Train; before step ``first`` the disk is filled, after step ``last`` it is emptied. The storage error that ends the run."""
    original, run_dir = Trainer._train_step, config.parent / "run"

    def step(self: Trainer) -> bool:
        if self.step + 1 == first:
            assert self.saving.newest() is not None, "a save in the background has ended"
        if world.is_main and self.step + 1 == first:
            fill(disk)
        stopping = original(self)
        if world.is_main and self.step == last:
            (disk / "ballast").unlink()
        return stopping

    with mock.patch.object(Trainer, "_train_step", step):
        try:
            run_dir.mkdir(exist_ok=True)
            world.barrier()
            with RankLog(run_dir, world):
                train(world, config, overrides)
        except StorageError as error:
            return str(error)
    return None


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_that_goes_on_misses_nothing_when_there_is_room_again(
    run_ranks: RunRanks, small_disk: Path, tmp_path: Path, asynchronous: bool
) -> None:
    plain = write_run(tmp_path / "plain", **OPTIONS)
    run_ranks(2, train, plain)
    config = write_run(small_disk / "mine", **OPTIONS, logging__tensorboard=True, checkpoint__asynchronous=asynchronous)
    assert run_ranks(2, train_on_full_disk, config, small_disk, 3, 5, ["checkpoint.on_failure=continue"]) == [None] * 2
    run = small_disk / "mine" / "run"
    assert losses(run) == losses(tmp_path / "plain" / "run") and len(losses(run)) == 8
    assert list(read_ledger(run)) == list(read_ledger(tmp_path / "plain" / "run"))
    assert len((run / "digests.jsonl").read_text("utf-8").splitlines()) == 9
    failed, *others = [event for event in read_events(run) if event.event == "save_failed"]
    assert failed.step == 4 and not others and "cannot be written: No space left on device; " in failed.details["error"]
    assert [event.step for event in read_events(run) if event.event == "save"] == [2, 6, 8]
    assert latest(run / "checkpoints") == run / "checkpoints" / "step_00000008"


def test_a_run_that_is_to_stop_says_why_on_all_ranks(run_ranks: RunRanks, small_disk: Path) -> None:
    config = write_run(small_disk / "mine", **OPTIONS)
    first, second = run_ranks(2, train_on_full_disk, config, small_disk, 3, 9, ["checkpoint.on_failure=stop"])
    assert first == second and first is not None
    assert first.startswith("cannot save the checkpoint: ") and "cannot be written: No space left on device; " in first
    (small_disk / "ballast").unlink()
    assert latest(small_disk / "mine/run/checkpoints") == small_disk / "mine/run/checkpoints/step_00000002"
    run_ranks(2, train, config)
    assert len(losses(small_disk / "mine" / "run")) == 8 and [row["step"] for row in read_ledger(small_disk / "mine" / "run")] == [
        *range(9)
    ]
