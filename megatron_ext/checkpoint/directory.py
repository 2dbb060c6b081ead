"""Names and order of the checkpoints of a run: step directories, the ``latest`` pointer, what is kept.

A checkpoint that gives its place to a new one of the same step is ``.step_NNNNNNNN.replaced`` meanwhile, and stands for the step as long
as nothing else does. Other names that begin with a point are leftovers.
"""

import os
import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.atomic_io import atomic_open, fsync_directory, make_directory
from megatron_ext.errors import CheckpointError

LATEST = "latest"
_STEP = re.compile(r"step_\d{8}")
_REPLACED = re.compile(r"\.(step_\d{8})\.replaced")


@dataclass(frozen=True)
class Eviction:
    """What became of checkpoints that are not kept."""

    removed: list[Path]
    """Oldest first. Their names are free, whether all of their files could be removed or not."""
    problems: list[str]
    """What could not be removed, and why."""


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step_{step:08d}"


def plain_name(path: Path) -> str:
    """The name of the step that a checkpoint is of, also while it gives its place to another."""
    replaced = _REPLACED.fullmatch(path.name)
    return replaced[1] if replaced else path.name


def step_of(path: Path) -> int:
    """The step that a checkpoint is of."""
    return int(plain_name(path).removeprefix("step_"))


def saved_steps(root: Path) -> list[Path]:
    """Checkpoints that were renamed into place, oldest first."""
    found = sorted(path for path in root.glob("*step_*") if _STEP.fullmatch(plain_name(path)) and _is_directory(path))
    # A point sorts before a letter: what replaces another comes later.
    places = {plain_name(path): path for path in found}
    return [places[name] for name in sorted(places)]


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        # Whoever reads it will say what is wrong with it.
        return True


def begin(root: Path, step: int, moved: Callable[[], None] = lambda: None) -> Path:
    """An empty directory beside the final one. What an interrupted save left behind is removed where it can be; ``moved`` as of ``remove``.

    Its name is new each time: ranks of a run that died may live on for seconds, and must not write into it.
    """
    make_directory(root)
    for leftover in _leftovers(root):
        remove(leftover, moved)
    beside = root / f".{step_directory(root, step).name}.{secrets.token_hex(4)}.tmp"
    (beside / "optimizer").mkdir(parents=True)
    return beside


def publish(root: Path, beside: Path, step: int) -> Path:
    """Rename a complete directory into place, then move ``latest`` to it. Interrupted anywhere, ``latest`` names what is there and whole.

    What it replaces is left to ``keep_newest``.
    """
    final = step_directory(root, step)
    for directory in (beside / "optimizer", beside):
        fsync_directory(directory)
    with atomic_open(root / LATEST) as file:
        file.write(final.name + "\n")
        file.flush()
        # A disk that is full fails here, before anything has changed.
        os.fsync(file.fileno())
        if os.path.lexists(final):
            replaced = root / f".{final.name}.replaced"
            if os.path.lexists(replaced):
                _set_aside(replaced)
            os.rename(final, replaced)
        os.rename(beside, final)
        fsync_directory(root)
    return final


def latest(root: Path) -> Path | None:
    """The checkpoint that ``latest`` names; None if nothing was ever saved.

    Raises:
        CheckpointError: ``latest`` is unreadable, or several checkpoints exist without it.
    """
    pointer = root / LATEST
    try:
        name = pointer.read_text("utf-8", errors="replace").strip()
    except FileNotFoundError:
        saved = saved_steps(root)
        if len(saved) > 1:
            raise CheckpointError(f"{pointer} is missing, but {root} has {len(saved)} checkpoints") from None
        # A first save that was killed between the rename and the pointer is whole.
        return saved[0] if saved else None
    except OSError as error:
        raise CheckpointError(f"{pointer}: {error.strerror}; accepted: a file with the name of a checkpoint") from error
    if not _STEP.fullmatch(name):
        raise CheckpointError(f"{pointer} says {name[:80]!r}; accepted: the name of a checkpoint such as step_00000100")
    return next((path for path in saved_steps(root) if plain_name(path) == name), root / name)


def keep_newest(root: Path, count: int, every: int | None = None, moved: Callable[[], None] = lambda: None) -> Eviction:
    """Remove all but the ``count`` newest checkpoints up to the one that ``latest`` names, and leftovers.

    Later ones are of an attempt that was given up by resuming from an older checkpoint; the run replaces them as it gets there. Steps that
    ``every`` divides stay. What cannot be removed is passed over. ``moved`` as of ``remove``.
    """
    current = latest(root)
    old = [path for path in saved_steps(root) if current is None or step_of(path) <= step_of(current)][: -max(1, count)]
    removed, problems = [], []
    for path in (path for path in old if every is None or step_of(path) % every):
        try:
            _set_aside(path)
            removed.append(path)
        except OSError as error:
            problems.append(f"{path} cannot be removed: {error}")
    problems += [problem for path in _leftovers(root) if (problem := remove(path, moved)) is not None]
    return Eviction(removed, problems)


def remove(path: Path, moved: Callable[[], None]) -> str | None:
    """Remove a file, a link and not what it leads to, or a directory with what is in it; returns what is wrong if that cannot be.

    ``moved`` is called after each file of a directory: to remove a large one takes a slow file system seconds.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            for folder, _, files in os.walk(path):
                for file in files:
                    os.unlink(os.path.join(folder, file))
                    moved()
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        return f"{path} cannot be removed: {error}"
    return None


def _leftovers(root: Path) -> list[Path]:
    standing = saved_steps(root)
    return sorted(path for name in ("step_*", f"{LATEST}.*.tmp") for path in root.glob(f".{name}") if path not in standing)


def _set_aside(path: Path) -> None:
    """Take its name from a checkpoint that goes away, so that an interrupted deletion leaves nothing that looks whole."""
    os.rename(path, path.with_name(f".{plain_name(path)}.{secrets.token_hex(4)}.removed"))
