"""Events for TensorBoard and the other monitors of DeepSpeed."""

from typing import Any

from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster


class Monitors:
    """Writes on rank 0, to the monitors that the configuration enables. Made after DeepSpeed has joined the process group.

    Args:
        config: the monitor sections of a DeepSpeed configuration.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._monitors = MonitorMaster(get_monitor_config(config))

    def write(self, events: list[tuple[str, float, int]]) -> None:
        """Send (name, value, step)."""
        if self._monitors.enabled:
            self._monitors.write_events(events)
