"""One run at a time in a run directory, by a lock that all its ranks know of.

A run that was only asleep, and lost its lock so, finds that out before it writes to its checkpoints the next time, and ends.
"""

from pathlib import Path
from types import TracebackType

from megatron_ext.errors import CheckpointError, ConfigError
from megatron_ext.parallel.world import World
from megatron_ext.train.file_lock import SILENT_SECONDS, TOUCH_SECONDS, FileLock, Owner

LOCK_FILE = "lock.json"


class RunLock:
    """A context in which no other run uses ``run_dir``. All ranks enter it; rank 0 holds the lock.

    Args:
        run_dir: exists on rank 0.
        world: all ranks.
        touch_seconds: between signs of life.
        silent_seconds: without a sign of life until a run of another machine counts as dead.

    Raises:
        ConfigError: on all ranks, on entering: names the run that uses the directory.
    """

    def __init__(self, run_dir: Path, world: World, touch_seconds: float = TOUCH_SECONDS, silent_seconds: float = SILENT_SECONDS) -> None:
        def refusal(owner: Owner) -> str:
            return (
                f"run_dir: {run_dir} is used by {owner}; accepted: a directory that no run uses. Stop that run first (tools/stop.py), or "
                "give this one another run_dir"
            )

        self._world = world
        self._lock = FileLock(run_dir / LOCK_FILE, refusal, touch_seconds, silent_seconds)

    def __enter__(self) -> "RunLock":
        error = None
        if self._world.is_main:
            try:
                self._lock.__enter__()
            except ConfigError as refused:
                error = str(refused)
        if error := self._world.on_main(error):
            raise ConfigError(error)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._world.is_main:
            self._lock.__exit__(kind, error, trace)

    def confirm(self) -> None:
        """Raise CheckpointError if another run has taken over. For rank 0."""
        if not self._lock.holds():
            raise CheckpointError(
                f"{self._lock.path} is no longer this run's, but of {self._lock.owner() or 'nobody'}: another run took over while this one "
                "gave no sign of life, or somebody removed the file. Nothing more is written to the checkpoints"
            )
