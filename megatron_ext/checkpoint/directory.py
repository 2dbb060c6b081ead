"""Names and order of the checkpoints of a run: step directories, the ``latest`` pointer, what is kept."""

import os
import re
import secrets
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
    """An empty directory beside the final one. What an interrupted save left behind is removed.

    Its name is new each time: ranks of a run that died may live on for seconds, and must not write into it.
    """
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".step_*"):
        shutil.rmtree(leftover)
    for leftover in root.glob(f".{LATEST}.*.tmp"):
        leftover.unlink()
    beside = root / f".{step_directory(root, step).name}.{secrets.token_hex(4)}.tmp"
    (beside / "optimizer").mkdir(parents=True)
    return beside


def publish(root: Path, beside: Path, step: int) -> Path:
    """Rename a complete directory into place, then move ``latest`` to it."""
    final = step_directory(root, step)
    for directory in (beside / "optimizer", beside):
        fsync_directory(directory)
    replaced = _replaced(root, final) if final.exists() else None
    os.rename(beside, final)
    fsync_directory(root)
    if replaced:
        shutil.rmtree(replaced)
    _point_to(final)
    return final


def _replaced(root: Path, final: Path) -> Path:
    """Set an earlier checkpoint of the same step aside; ``latest`` names an older one as long as it is away, if there is one."""
    older = [path for path in saved_steps(root) if path < final]
    if older and latest(root) == final:
        _point_to(older[-1])
    return _set_aside(final)


def _point_to(path: Path) -> None:
    with atomic_open(path.parent / LATEST) as file:
        file.write(path.name + "\n")


def latest(root: Path) -> Path | None:
    """The checkpoint that ``latest`` names; None if nothing was ever saved.

    Raises:
        CheckpointError: ``latest`` is unreadable, or several checkpoints exist without it.
    """
    pointer = root / LATEST
    if not pointer.exists():
        saved = saved_steps(root)
        if len(saved) > 1:
            raise CheckpointError(f"{pointer} is missing, but {root} has {len(saved)} checkpoints")
        # A first save that was killed between the rename and the pointer is whole.
        return saved[0] if saved else None
    try:
        name = pointer.read_text("utf-8", errors="replace").strip()
    except OSError as error:
        raise CheckpointError(f"{pointer}: {error.strerror}; accepted: a file with the name of a checkpoint") from error
    if not _STEP.fullmatch(name):
        raise CheckpointError(f"{pointer} says {name[:80]!r}; accepted: the name of a checkpoint such as step_00000100")
    return root / name


def keep_newest(root: Path, count: int, every: int | None = None) -> list[Path]:
    """Remove all but the ``count`` newest checkpoints up to the one that ``latest`` names; returns what was removed, oldest first.

    Later ones are of an attempt that was given up by resuming from an older checkpoint; the run replaces them as it gets there. Steps that
    ``every`` divides stay.
    """
    current = latest(root)
    old = [path for path in saved_steps(root) if current is None or path <= current][: -max(1, count)]
    evicted = [path for path in old if every is None or _step_of(path) % every]
    for path in evicted:
        shutil.rmtree(_set_aside(path))
    return evicted


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _set_aside(path: Path) -> Path:
    """Take its name from a checkpoint that goes away, so that an interrupted deletion leaves nothing that looks whole."""
    doomed = path.with_name(f".{path.name}.removed")
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(path, doomed)
    return doomed
