"""What DeepSpeed's monitors get: TensorBoard's files, and the calls of Weights & Biases, by a stand-in and by the package where it is."""

import errno
import os
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ext.config import load_config, monitor_config
from megatron_ext.errors import ConfigError
from megatron_ext.parallel.world import World
from megatron_ext.train.monitors import Monitors, check_monitors
from tests.distributed import RunRanks
from tests.train.tiny_run import losses, train, write_run

WANDB = {"deepspeed": {"wandb": {"enabled": True, "project": "mine", "group": "tests"}}}


def with_stand_in(world: World, config: Path) -> list[Any]:
    """Train with a module in the place of wandb; returns the calls that it saw on this rank, and what it would find in the environment."""
    calls: list[Any] = []
    stand_in = types.ModuleType("wandb")
    stand_in.__version__ = "0.18.0"
    stand_in.init = lambda **named: calls.append(["init", named, os.environ["WANDB_DIR"], os.environ["WANDB_NAME"]])
    stand_in.log = lambda data, step=None, commit=None: calls.append(["log", data, step])
    sys.modules["wandb"] = stand_in
    train(world, config)
    return calls


def offline(world: World, config: Path) -> None:
    """Train with the package itself, which talks to nobody."""
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    train(world, config)
    import wandb

    if world.is_main:
        wandb.finish()


def test_tensorboard_has_the_losses_of_the_run(run_ranks: RunRanks, tmp_path: Path) -> None:
    run_ranks(1, train, write_run(tmp_path, train__steps=3, logging__tensorboard=True))
    written = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    written.Reload()
    assert {event.step: event.value for event in written.Scalars("train/loss")} == pytest.approx(losses(tmp_path / "run"))
    assert {"train/lr", "train/grad_norm", "held_out/prose"} <= set(written.Tags()["scalars"])


def test_weights_and_biases_gets_every_step_from_one_rank(run_ranks: RunRanks, tmp_path: Path) -> None:
    calls, others = run_ranks(2, with_stand_in, write_run(tmp_path, train__steps=3, **WANDB))
    assert calls[0] == ["init", {"project": "mine", "group": "tests", "entity": None}, str(tmp_path / "run"), "run"]
    sent = {step: data["train/loss"] for name, data, step in calls[1:] if "train/loss" in data}
    assert sent == losses(tmp_path / "run") and others == []


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed: pip install '.[wandb]'")
def test_weights_and_biases_offline_writes_into_the_run_directory(run_ranks: RunRanks, tmp_path: Path) -> None:
    run_ranks(1, offline, write_run(tmp_path, train__steps=3, **WANDB))
    (files,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert any(path.suffix == ".wandb" and path.stat().st_size > 0 for path in files.iterdir())


class FullMonitors:
    """In the place of DeepSpeed's, on a disk that is full."""

    enabled = True
    asked = 0

    def __init__(self, config: Any) -> None:
        pass

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        self.asked += 1
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_monitor_that_cannot_be_written_is_said_once_and_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_ext.train.monitors.MonitorMaster", FullMonitors)
    monitors = Monitors(monitor_config(load_config(write_run(tmp_path), [])), tmp_path)
    for step in range(3):
        monitors.write([("train/loss", 1.0, step)])
    said = "monitors cannot be written: [Errno 28] No space left on device. They get no more of this run; metrics.jsonl has it all\n"
    assert capsys.readouterr().err == said and monitors._monitors.asked == 1


def test_it_is_refused_before_the_run_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(write_run(tmp_path, **WANDB), [])
    monkeypatch.setattr("megatron_ext.train.monitors.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"deepspeed\.wandb\.enabled: true; accepted: false"):
        check_monitors(monitor_config(config))
    check_monitors(monitor_config(load_config(write_run(tmp_path), [])))
