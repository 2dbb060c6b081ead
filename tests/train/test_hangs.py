"""Whole runs on real ranks of which one stands still, skips a collective or is stopped: it is named, with its stack, and all end."""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext.checkpoint import load, manifest, optimizer_state
from megatron_ext.config import load_config
from megatron_ext.parallel import heartbeat
from megatron_ext.parallel.world import World
from megatron_ext.report.events import read_events
from megatron_ext.train import packs, trainer
from megatron_ext.train.engine import Engine
from megatron_ext.train.rank_log import log_path
from megatron_ext.train.run import pretrain
from tests.distributed import RankError, RunRanks
from tests.train.tiny_run import records, write_run

VICTIM, STEP = 1, 4


def dawdle(seconds: float) -> None:
    """What the stack must show."""
    time.sleep(seconds)


def slow_data(world: World, step: int, seconds: float) -> None:
    """Reading takes long, of every pack of the step and of later ones on this rank."""
    real = packs.read_pack

    def read(*arguments: Any) -> Any:
        if len(steps_done) + 1 >= step:
            dawdle(seconds)
        return real(*arguments)

    steps_done: list[int] = []
    whole = Engine.step

    def count(self: Engine, *arguments: Any) -> Any:
        result = whole(self, *arguments)
        steps_done.append(1)
        return result

    packs.read_pack, Engine.step = read, count


def slow_after(module: Any, name: str, seconds: float) -> None:
    """``module.name`` takes so long whenever it has done its work."""
    real = getattr(module, name)

    def slow(*arguments: Any, **named: Any) -> Any:
        result = real(*arguments, **named)
        dawdle(seconds)
        return result

    setattr(module, name, slow)


PLACES = {
    "start": (trainer, "build_model"),
    "load": (load, "read_state"),
    "save": (optimizer_state, "require_finite"),
    "end": (Engine, "close"),
}
"""What stands still on the victim, by the phase that it is then in."""


def faulty(world: World, config: Path, fault: str) -> None:
    """``pretrain`` with a fault built in."""
    leave = os._exit
    # The test's own launcher kills the ranks that are left when one ends; all are to write their logs first.
    heartbeat.os._exit = lambda code: (time.sleep(2), leave(code))
    whole = Engine.step

    def step(self: Engine, *arguments: Any) -> Any:
        result = whole(self, *arguments)
        if self.grid.world.activity.now.step == STEP:
            if fault == "skip" and world.rank != VICTIM:
                self.grid.dp.all_reduce(torch.ones(1))
            if fault == "stop" and world.rank == VICTIM:
                os.kill(os.getpid(), signal.SIGSTOP)
        return result

    Engine.step = step
    if fault == "data" and world.rank == VICTIM:
        slow_data(world, STEP, 1000)
    if fault in PLACES and world.rank == VICTIM:
        slow_after(*PLACES[fault], 1000)
    if fault == "slow files" and world.rank == VICTIM:
        slow_after(optimizer_state, "require_finite", 0.5)
        slow_after(manifest, "file_entry", 0.7)
    if fault == "slow":
        slow_data(world, 1, 0.7)
    # The test's own launcher ends the group.
    end, dist.destroy_process_group = dist.destroy_process_group, lambda: None
    pretrain(load_config(config, []))
    dist.destroy_process_group = end


def config_of(folder: Path, **changes: Any) -> Path:
    options = {"train__steps": 6, "train__hang_timeout": 1.0, "train__heartbeat_timeout": 8.0}
    return write_run(folder, **options | changes)


@pytest.mark.parametrize(
    ("fault", "event", "told"),
    [
        ("data", "hang", "rank 1 on host {} (ranks [0, 1, 2]) has not moved for "),
        ("skip", "hang", "rank 1 on host {} (ranks [0, 1, 2]) has not moved for "),
        ("stop", "silence", "rank 1 on host {} (ranks [0, 1, 2]) has not been heard for "),
    ],
)
def test_the_rank_that_holds_the_others_up_is_named(
    run_ranks: RunRanks, tmp_path: Path, capfd: pytest.CaptureFixture[str], fault: str, event: str, told: str
) -> None:
    with pytest.raises(RankError, match="ended without an answer"):
        run_ranks(3, faulty, config_of(tmp_path, train__hang_timeout=30.0 if fault == "stop" else 1.0), fault)
    errors = capfd.readouterr().err
    host = os.uname().nodename
    assert told.format(host) in errors, errors
    last = read_events(tmp_path / "run")[-1]
    assert (last.event, last.details["rank"], last.details["host"]) == (event, VICTIM, host)
    assert last.step in (STEP, STEP + 1), "where rank 0 was, which may have gone on as far as it could"
    what = last.details["what"]
    assert int(re.search(r" for (\d+) s", what)[1]) < 60, "a collective would have waited for half an hour"
    if fault == "data":
        assert ": step 4, data of pack 1 of " in what and "ranks 0, 2: step 4, " in what and ", in " in what
        assert "rank 1 stands here (step 4, data" in errors and "in dawdle" in errors
    if fault == "skip":
        assert "in broadcast (world of ranks 0, 1, 2" in what and "ranks 0, 2: step 4, exchange, in all_reduce (dp of ranks 0, 1, 2" in what
        assert "rank 1 stands here (step 5, plan, in broadcast" in errors and "in from_main" in errors
    if fault == "stop":
        assert re.search(r"s\): step [0-4], ", what), "what its last beat said, which is older than steps of milliseconds"
        return
    for rank, function in enumerate(["all_reduce", "dawdle" if fault == "data" else "from_main", "all_reduce"]):
        lines = [json.loads(line) for line in log_path(tmp_path / "run", rank).read_text("utf-8").splitlines()]
        (stands,) = [line for line in lines if line["logger"] == "megatron_ext.parallel.heartbeat"]
        stack = "\n".join(stands["details"]["stack"])
        assert stands["level"] == "ERROR" and stands["rank"] == rank and "rank 1 on host" in stands["message"]
        assert function in stack or (fault == "data" and rank != VICTIM), stack


@pytest.mark.parametrize(("phase", "step"), [("start", 0), ("load", 0), ("save", 2), ("end", 2)])
def test_a_rank_that_stands_still_outside_the_steps_is_named(
    run_ranks: RunRanks, tmp_path: Path, capfd: pytest.CaptureFixture[str], phase: str, step: int
) -> None:
    config = config_of(tmp_path, train__steps=2)
    if phase == "load":
        run_ranks(1, faulty, config, "none")
    with pytest.raises(RankError, match="ended without an answer"):
        run_ranks(2, faulty, config, phase)
    last = read_events(tmp_path / "run")[-1]
    assert (last.event, last.details["rank"]) == ("hang", VICTIM)
    assert f" s: step {step}, {phase}. rank 0: step {step}, {phase}, in " in last.details["what"]
    assert "in dawdle" in capfd.readouterr().err


def test_slow_files_are_no_hang_as_long_as_one_follows_the_other(run_ranks: RunRanks, tmp_path: Path) -> None:
    """One rank takes longer than the limit to save, and to verify at the next start, but no tensor and no file does."""
    config = config_of(tmp_path, train__steps=3, checkpoint__every=None, checkpoint__max_shard_gib=1e-5)
    for steps in (3, 6):
        config.write_text(config.read_text("utf-8").replace("steps: 3", f"steps: {steps}"), "utf-8")
        run_ranks(2, faulty, config, "slow files")
    events = read_events(tmp_path / "run")
    assert [event.event for event in events if event.event in ("hang", "failure", "finish")] == ["finish"] * 2
    assert max(event.details["seconds"] for event in events if event.event == "save") > 4.0
    entries = json.loads((tmp_path / "run/checkpoints/step_00000003/trainer_state.json").read_text("utf-8"))["files"]
    assert len(entries) // 2 * 0.7 > 4.0, "what the slow rank took to verify"


def test_a_run_that_is_slow_but_gets_on_is_left_alone(run_ranks: RunRanks, tmp_path: Path) -> None:
    """Each step reads for longer than the timeout, and the others wait; the first step, and ten of the median ones, may take that."""
    config = config_of(tmp_path, train__steps=3)
    run_ranks(2, faulty, config, "slow")
    assert [event.event for event in read_events(tmp_path / "run")][-1] == "finish"
    assert max(record["step_seconds"] for record in records(tmp_path / "run", "train")) > 1.0
