"""The checkpoint to go on from when the newest may be damaged."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.checkpoint.directory import latest, saved_steps, step_of
from megatron_ext.checkpoint.manifest import damaged_files, read_state
from megatron_ext.errors import CheckpointError


@dataclass(frozen=True)
class Choice:
    """A checkpoint and why it is not a newer one."""

    path: Path | None
    """None: none is whole, or none was ever saved."""
    passed_over: tuple[str, ...] = ()
    """What is wrong with each newer one, newest first."""

    @property
    def step(self) -> int:
        """The step after which it was saved; 0 without one."""
        return step_of(self.path) if self.path is not None else 0


def newest_whole(root: Path) -> Choice:
    """The newest checkpoint up to ``latest`` whose files all have their saved hashes; an unreadable ``latest`` is passed over too."""
    try:
        newest = latest(root)
    except CheckpointError as error:
        candidates, passed_over = saved_steps(root), [str(error)]
    else:
        candidates = [] if newest is None else [path for path in saved_steps(root) if step_of(path) < step_of(newest)] + [newest]
        passed_over = []
    for path in reversed(candidates):
        problems = damage(path)
        if not problems:
            return Choice(path, tuple(passed_over))
        passed_over.append("; ".join(problems))
    return Choice(None, tuple(passed_over))


def damage(directory: Path) -> list[str]:
    """What is wrong with a checkpoint, one message a file; empty if it is whole. Hashes files in as many threads as there are cores."""
    try:
        files = read_state(directory)["files"]
    except CheckpointError as error:
        return [str(error)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return [message for messages in threads.map(lambda name: damaged_files(directory, files, [name]), files) for message in messages]
