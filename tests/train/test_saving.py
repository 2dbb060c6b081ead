"""What follows a save, and one that fails: events, the run's end or its going on, on a disk that is really full too."""

import errno
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_ext.checkpoint.directory import latest, saved_steps
from megatron_ext.checkpoint.load import verify
from megatron_ext.checkpoint.options import CheckpointOptions
from megatron_ext.checkpoint.save import OwnedFile
from megatron_ext.errors import CheckpointError, NonFiniteError, StorageError, TrainingError
from megatron_ext.parallel.world import World
from megatron_ext.report.events import read_events
from megatron_ext.train.console import Console
from megatron_ext.train.metrics import MetricsWriter
from megatron_ext.train.saving import Saving, is_asynchronous
from megatron_ext.train.step_guard import StepGuard
from tests.checkpoint.tiny_state import trained, weight_of, writer
from tests.distributed import RankError, RunRanks
from tests.grids import ALONE
from tests.mounts import mounted
from tests.train.bad_steps import train_badly
from tests.train.tiny_run import losses, train, write_run


class Run:
    """A run that only saves, into ``folder``/checkpoints."""

    def __init__(self, folder: Path, options: CheckpointOptions, world: World = ALONE, **changes: Any) -> None:
        self.folder, self.root = folder, folder / "checkpoints"
        folder.mkdir(exist_ok=True)
        self.model, self.optimizer = trained(world)
        checkpoints = replace(writer(self.root, world), keep_last=options.keep_last, keep_every=options.keep_every, **changes)
        self.saving = Saving(checkpoints, options, MetricsWriter(folder, 0, world.is_main), Console(world.is_main, 9))

    def save(self, step: int, last: bool = False) -> None:
        self.saving.save(step, weight_of(self.model), self.optimizer, {"tokens": 10 * step}, last)

    def finish_background(self) -> None:
        """Steps of training, until a save in the background has ended."""
        while self.saving._pending is not None:
            self.saving.look()
            time.sleep(0.001)

    def events(self) -> list[tuple[str, int]]:
        return [(event.event, event.step) for event in read_events(self.folder)]

    def kept(self) -> list[int]:
        return [int(path.name[-8:]) for path in saved_steps(self.root)]


def full(*arguments: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_events_say_what_was_saved_and_evicted(tmp_path: Path, asynchronous: bool, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, CheckpointOptions(keep_last=1, keep_every=4, asynchronous=asynchronous))
    for step in (2, 4, 6):
        run.save(step)
        run.finish_background()
    run.save(7, last=True)
    assert run.kept() == [4, 7]
    assert run.events() == [("save", 2), ("save", 4), ("evict", 4), ("save", 6), ("save", 7), ("evict", 7)]
    saves = [event.details for event in read_events(tmp_path) if event.event == "save"]
    assert [details["asynchronous"] for details in saves] == [asynchronous] * 3 + [False], "the last one is waited for"
    assert all(details["stall_seconds"] > 0 and details["seconds"] > 0 and details["num_bytes"] > 1000 for details in saves)
    assert [event.details["checkpoint"] for event in read_events(tmp_path) if event.event == "evict"] == ["step_00000002", "step_00000006"]
    assert capsys.readouterr().out.count("beside training, which waited") == 3 * asynchronous


def test_a_save_waits_for_the_one_before(tmp_path: Path) -> None:
    run = Run(tmp_path, CheckpointOptions(keep_last=9, asynchronous=True))
    original = OwnedFile.write

    def slow(self: OwnedFile, *arguments: Any) -> list[str]:
        time.sleep(0.3)
        return original(self, *arguments)

    with mock.patch.object(OwnedFile, "write", slow):
        run.save(1)
        run.saving.look()
        assert run.events() == [], "still writing"
        run.save(2)
        assert run.events() == [("save", 1)]
        run.save(3, last=True)
    assert run.events() == [("save", step) for step in (1, 2, 3)] and latest(run.root) == run.root / "step_00000003"
    saves = [event.details for event in read_events(tmp_path)]
    assert saves[0]["stall_seconds"] < saves[0]["seconds"] and saves[1]["stall_seconds"] > 0.2 < saves[2]["stall_seconds"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_save_stops_the_run_or_not(tmp_path: Path, asynchronous: bool, capsys: pytest.CaptureFixture[str]) -> None:
    going_on = Run(tmp_path / "continue", CheckpointOptions(asynchronous=asynchronous, on_failure="continue"))
    stopping = Run(tmp_path / "stop", CheckpointOptions(asynchronous=asynchronous, on_failure="stop"))
    for run in (going_on, stopping):
        run.save(1)
        run.finish_background()
    with mock.patch.object(OwnedFile, "write", full):
        going_on.save(2)
        going_on.finish_background()
        with pytest.raises(StorageError, match="No space left on device. The checkpoint needs 0.1 MiB; without it .* MiB free"):
            stopping.save(2)
            stopping.finish_background()
    for run in (going_on, stopping):
        assert run.events() == [("save", 1), ("save_failed", 2)] and latest(run.root) == run.root / "step_00000001"
        assert sorted(path.name for path in run.root.iterdir()) == ["latest", "step_00000001"]
    assert "The run goes on, as checkpoint.on_failure says" in capsys.readouterr().out
    going_on.save(3)
    going_on.finish_background()
    assert latest(going_on.root) == going_on.root / "step_00000003"
    with mock.patch.object(OwnedFile, "write", full), pytest.raises(StorageError):
        going_on.save(4, last=True)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_weights_that_are_not_finite_and_a_lost_lock_always_stop_the_run(tmp_path: Path, asynchronous: bool) -> None:
    def lost() -> None:
        raise CheckpointError("lock.json is no longer this run's")

    options = CheckpointOptions(asynchronous=asynchronous, on_failure="continue")
    run = Run(tmp_path, options)
    run.save(1)
    run.finish_background()
    with pytest.raises(CheckpointError, match="no longer this run's") as caught:
        Run(tmp_path, options, confirm=lost).save(2)
    assert not isinstance(caught.value, StorageError)
    with torch.no_grad():
        next(run.model.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"model.embed_tokens.weight \(exported\) are not finite"):
        run.save(2)
        run.finish_background()
    assert run.events() == [("save", 1)] and run.kept() == [1] and latest(run.root) == run.root / "step_00000001"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with little room."""
    with mounted(tmp_path / "disk", "size=512k") as folder:
        yield folder


@pytest.mark.parametrize("asynchronous", [False, True])
def test_on_a_disk_that_is_full_old_checkpoints_stay_whole(small_disk: Path, asynchronous: bool) -> None:
    run = Run(small_disk, CheckpointOptions(keep_last=9, asynchronous=asynchronous, on_failure="continue"))
    step = 0
    while ("save_failed", step) not in run.events():
        step += 1
        assert step < 20, "the disk is never full"
        run.save(step)
        run.finish_background()
    error = next(event.details["error"] for event in read_events(small_disk) if event.event == "save_failed")
    assert "[Errno 28] No space left on device" in error and "The checkpoint needs 0.1 MiB; without it " in error
    assert run.kept() == list(range(1, step)) and latest(run.root) == run.root / f"step_{step - 1:08d}"
    assert all(verify(path, ALONE)["step"] for path in saved_steps(run.root))
    assert not list(run.root.glob(".*")), "nothing of the unfinished one is left"
    shutil.rmtree(run.root / "step_00000001")
    run.save(step + 1, last=True)
    assert latest(run.root) == run.root / f"step_{step + 1:08d}"


def test_nothing_is_evicted_before_the_new_one_is_there(tmp_path: Path) -> None:
    Run(tmp_path, CheckpointOptions(keep_last=2)).save(1)
    Run(tmp_path, CheckpointOptions(keep_last=2)).save(2)
    run, rename = Run(tmp_path, CheckpointOptions(keep_last=1, on_failure="continue")), os.rename

    def full_for_the_new_one(path: Path, to: Path) -> None:
        full() if to.name == "step_00000003" else rename(path, to)

    with mock.patch.object(os, "rename", full_for_the_new_one):
        run.save(3)
    assert run.kept() == [1, 2] and all(verify(path, ALONE)["step"] for path in saved_steps(run.root))
    run.save(3)
    assert run.kept() == [3]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_that_cannot_be_removed_is_no_failure_of_a_save(
    tmp_path: Path, asynchronous: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run, rmtree = Run(tmp_path, CheckpointOptions(keep_last=1, asynchronous=asynchronous)), shutil.rmtree

    def stuck(path: Path, **options: Any) -> None:
        if "step_00000001" in path.name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path / "model.safetensors"))
        rmtree(path, **options)

    with mock.patch.object(shutil, "rmtree", stuck):
        for step in (1, 2, 3):
            run.save(step)
            run.finish_background()
            assert run.saving.newest() == run.root / f"step_{step:08d}" == latest(run.root)
    assert run.events() == [("save", 1), ("save", 2), ("evict", 2), ("evict_failed", 2), ("save", 3), ("evict", 3), ("evict_failed", 3)]
    error = next(event.details["error"] for event in read_events(tmp_path) if event.event == "evict_failed")
    assert "/.step_00000001." in error and "cannot be removed: [Errno 13] Permission denied" in error
    said = capsys.readouterr().out
    assert said.count("Permission denied") == 2 and said.count("It is tried again after the next save") == 2
    run.save(4, last=True)
    assert run.kept() == [4] and not list(run.root.glob(".*"))


FAILURES = {"disk full": OSError(errno.ENOSPC, "No space left on device"), "not finite": NonFiniteError("a weight is not finite")}


def train_badly_while_saving(world: World, config: Path, overrides: list[str], failure: str | None) -> None:
    """The save after step 3 is written no sooner than bad steps end the run."""
    write, check, ended = OwnedFile.write, StepGuard.check, threading.Event()

    def late(self: OwnedFile, *arguments: Any) -> list[str]:
        assert ended.wait(60)
        if failure is not None:
            raise FAILURES[failure]
        return write(self, *arguments)

    def noted(self: StepGuard, has_checkpoint: bool) -> None:
        try:
            check(self, has_checkpoint)
        except TrainingError:
            ended.set()
            raise

    with mock.patch.object(OwnedFile, "write", late), mock.patch.object(StepGuard, "check", noted):
        train_badly(world, config, overrides, (), (4, 5))


@pytest.mark.parametrize("failure", [None, *FAILURES])
def test_a_run_that_bad_steps_end_keeps_what_it_was_saving(run_ranks: RunRanks, tmp_path: Path, failure: str | None) -> None:
    config = write_run(tmp_path, checkpoint__asynchronous=True)
    with pytest.raises(RankError, match="TrainingError: skipped 2 steps in a row"):
        run_ranks(2, train_badly_while_saving, config, ["train.skip.most_consecutive=2"], failure)
    (told,) = [event for event in read_events(tmp_path / "run") if event.event.startswith("save")]
    assert (told.event, told.step) == ("save_failed" if failure else "save", 3)
    assert failure is None or str(FAILURES[failure]) in told.details["error"]
    root = tmp_path / "run" / "checkpoints"
    assert latest(root) == (None if failure else root / "step_00000003")


def test_a_run_that_has_no_step_to_train_says_where_its_checkpoint_is(
    run_ranks: RunRanks, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = (write_run(tmp_path / name, train__steps=2) for name in ("first", "second"))
    checkpoints = tmp_path / "first" / "run" / "checkpoints"
    for config in (first, first, second):
        run_ranks(1, train, config, ["checkpoint.resume=auto" if config == first else f"checkpoint.resume={checkpoints}/step_00000002"])
        assert f"finished: step 2 is in {checkpoints}\n" in capfd.readouterr().out
    assert not (tmp_path / "second" / "run" / "checkpoints").exists()


def test_the_default_spares_the_cores_and_the_memory_of_cpus() -> None:
    devices = [torch.device("cpu"), torch.device("cuda", 0)]
    assert [is_asynchronous(CheckpointOptions(), device) for device in devices] == [False, True]
    assert [is_asynchronous(CheckpointOptions(asynchronous=True), device) for device in devices] == [True, True]
    assert [is_asynchronous(CheckpointOptions(asynchronous=False), device) for device in devices] == [False, False]


GRIDS = {
    "tp2": ["parallel.tp=2"],
    "pp2": ["parallel.pp=2"],
    "zero3": ["optimizer.sharding=zero3"],
}


@pytest.mark.parametrize("name", GRIDS)
def test_on_any_grid_the_files_are_those_of_a_save_that_was_waited_for(run_ranks: RunRanks, tmp_path: Path, name: str) -> None:
    for asynchronous in (False, True):
        config = write_run(tmp_path / str(asynchronous), checkpoint__keep_last=9, train__steps=4, checkpoint__asynchronous=asynchronous)
        run_ranks(2, train, config, [*GRIDS[name], "checkpoint.every=1", "planning.ahead=0"])
    folders = [tmp_path / str(asynchronous) / "run" for asynchronous in (False, True)]
    assert losses(folders[0]) == losses(folders[1])
    saves = [[event for event in read_events(folder) if event.event == "save"] for folder in folders]
    assert [[event.step for event in of_run] for of_run in saves] == [[1, 2, 3, 4]] * 2
    assert [event.details["asynchronous"] for event in saves[1]] == [True, True, True, False]
    for step in range(1, 5):
        states = [verify(folder / "checkpoints" / f"step_{step:08d}", ALONE) for folder in folders]
        assert states[0]["files"] == states[1]["files"], f"step {step}"
