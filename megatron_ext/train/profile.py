"""Traces of a few steps, for chrome://tracing or Perfetto, and the operators that took longest."""

import os
from pathlib import Path

from torch.profiler import profile

from megatron_ext.atomic_io import atomic_open, fsync_file
from megatron_ext.config.run_options import ProfileOptions
from megatron_ext.errors import ConfigError
from megatron_ext.parallel.world import World

FOLDER = "profile"
TOP_OPERATORS = 30


def check_ranks(options: ProfileOptions | None, world_size: int) -> None:
    """Raises ConfigError if a rank that is to write a trace does not exist."""
    if options is not None and options.ranks[-1] >= world_size:
        raise ConfigError(f"logging.profile.ranks: {options.ranks}; accepted: ranks below {world_size}, the ranks of the run")


class StepProfile:
    """Traces the steps that the options name, on the ranks that they name.

    A run that is resumed among these steps traces those that are left. Every trace says in its name which steps it has.

    Args:
        options: of the run; None: nothing is traced.
        run_dir: gets a folder for the traces.
        world: the ranks.
    """

    def __init__(self, options: ProfileOptions | None, run_dir: Path, world: World) -> None:
        self._steps = options.steps if options is not None and world.rank in options.ranks else [0, 0]
        self._folder, self._rank = run_dir / FOLDER, world.rank
        self._sort_by = "self_cpu_time_total" if world.device.type == "cpu" else "self_device_time_total"
        self._first = 0
        self._profile: profile | None = None

    def begin_step(self, step: int) -> None:
        """A step begins."""
        first, last = self._steps
        if self._profile is None and first <= step <= last:
            self._first, self._profile = step, profile()
            self._profile.start()

    def end_step(self, step: int, stopping: bool) -> Path | None:
        """A step has ended; returns the trace if it was the last to be traced, or if ``stopping``."""
        if self._profile is None or (step < self._steps[1] and not stopping):
            return None
        traced, self._profile = self._profile, None
        traced.stop()
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"steps_{self._first:08d}_{step:08d}_rank_{self._rank:05d}.json.gz"
        # Its name says how it is compressed, so that it is exported beside under a name with the same end.
        beside = self._folder / f".{os.getpid()}.{path.name}"
        try:
            traced.export_chrome_trace(str(beside))
            fsync_file(beside)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        with atomic_open(path.with_name(path.name.removesuffix(".json.gz") + ".txt")) as file:
            file.write(traced.key_averages().table(sort_by=self._sort_by, row_limit=TOP_OPERATORS) + "\n")
        return path
