"""Names and order of the checkpoints of a run: step directories, the ``latest`` pointer, what is kept."""

import os
import re
import shutil
from pathlib import Path

from megatron_ext.atomic_io import atomic_open, fsync_directory
from megatron_ext.errors import CheckpointError

LATEST = "latest"
_STEP = re.compile(r"step_(\d{8})")


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step_{step:08d}"


def saved_steps(root: Path) -> list[Path]:
    """Checkpoints that were renamed into place, oldest first."""
    return sorted(path for path in root.glob("step_*") if _STEP.fullmatch(path.name) and path.is_dir())


def begin(root: Path, step: int) -> Path:
    """An empty directory beside the final one. What an interrupted save left behind is removed."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".step_*"):
        shutil.rmtree(leftover)
    beside = root / f".{step_directory(root, step).name}.tmp"
    (beside / "optimizer").mkdir(parents=True)
    return beside


def publish(root: Path, beside: Path, step: int) -> Path:
    """Rename a complete directory into place, then move ``latest`` to it."""
    final = step_directory(root, step)
    for directory in (beside / "optimizer", beside):
        fsync_directory(directory)
    if final.exists():
        _remove(final)
    os.rename(beside, final)
    fsync_directory(root)
    with atomic_open(root / LATEST) as file:
        file.write(final.name + "\n")
    return final


def latest(root: Path) -> Path | None:
    """The checkpoint that ``latest`` names; None if nothing was ever saved.

    Raises:
        CheckpointError: ``latest`` is unreadable, or checkpoints exist without it.
    """
    pointer = root / LATEST
    if not pointer.exists():
        return None
    name = pointer.read_text("utf-8", errors="replace").strip()
    if not _STEP.fullmatch(name):
        raise CheckpointError(f"{pointer} says {name[:80]!r}; accepted: the name of a checkpoint such as step_00000100")
    return root / name


def keep_newest(root: Path, count: int) -> None:
    """Remove all but the ``count`` newest checkpoints; the one that ``latest`` names always stays."""
    current = latest(root)
    for path in saved_steps(root)[: -max(1, count)]:
        if path != current:
            _remove(path)


def _remove(path: Path) -> None:
    """Delete a checkpoint so that, if interrupted, no half of it keeps its name."""
    doomed = path.with_name(f".{path.name}.removed")
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(path, doomed)
    shutil.rmtree(doomed)
