"""Events for TensorBoard, Weights & Biases and the other monitors of DeepSpeed."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster

from megatron_ext.errors import ConfigError
from megatron_ext.train.console import say


class Monitors:
    """Writes on rank 0, to the monitors that the configuration enables. Made after DeepSpeed has joined the process group.

    Weights & Biases keeps its files in the run directory and calls the run by its name, unless WANDB_DIR and WANDB_NAME say otherwise; with
    WANDB_MODE=offline it talks to nobody.

    Args:
        config: the monitor sections of a DeepSpeed configuration.
        run_dir: of the run.
    """

    def __init__(self, config: dict[str, Any], run_dir: Path) -> None:
        if _asks_for_wandb(config):
            os.environ.setdefault("WANDB_DIR", str(run_dir))
            os.environ.setdefault("WANDB_NAME", run_dir.name)
        self._monitors = MonitorMaster(get_monitor_config(config))
        self._broken = False

    def write(self, events: list[tuple[str, float, int]]) -> None:
        """Send (name, value, step)."""
        if not self._monitors.enabled or self._broken:
            return
        try:
            self._monitors.write_events(events)
        except OSError as error:
            # Their writers end for good with the first error; what they would show is in metrics.jsonl.
            self._broken = True
            say(f"monitors cannot be written: {error}. They get no more of this run; metrics.jsonl has it all", sys.stderr)


def check_monitors(config: dict[str, Any]) -> None:
    """Raise ConfigError if the monitor sections of a DeepSpeed configuration ask for a package that is not installed."""
    if _asks_for_wandb(config) and find_spec("wandb") is None:
        raise ConfigError("deepspeed.wandb.enabled: true; accepted: false, or true with wandb installed (pip install '.[wandb]')")


def _asks_for_wandb(config: dict[str, Any]) -> bool:
    return bool(config.get("wandb", {}).get("enabled"))
