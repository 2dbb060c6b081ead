"""Read a checkpoint: verify every file first, then only the rows that this rank owns."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint.directory import latest, plain_name, saved_steps
from megatron_ext.checkpoint.manifest import STATE_FILE, damaged_files, read_state
from megatron_ext.checkpoint.optimizer_state import OwnedStateReader
from megatron_ext.checkpoint.save import SavedOptimizer
from megatron_ext.errors import CheckpointError
from megatron_ext.optim.ownership import OwnedBox
from megatron_ext.optim.state_change import StateChange
from megatron_ext.parallel.world import World


def find_checkpoint(root: Path, resume: str, branch_from: str | None = None, moved: Callable[[], None] = lambda: None) -> Path | None:
    """The checkpoint to resume from.

    Args:
        root: directory that holds the run's checkpoints.
        resume: ``auto`` (the latest in ``root``, or else ``branch_from``), ``never``, or a checkpoint directory.
        branch_from: the checkpoint of another run that this one begins from; None: it begins from nothing.
        moved: called while files are looked through.

    Raises:
        CheckpointError: the directory does not exist, or ``latest`` does not say which it is; names the next older whole checkpoint.
    """
    if resume == "never":
        return None
    try:
        path = latest(root) if resume == "auto" else Path(resume)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_offer(saved_steps(root), moved)}") from error
    if path is None and branch_from is not None:
        path = Path(branch_from)
    if path is not None and (problem := _not_there(path)):
        raise CheckpointError(f"{path} {problem}{_offer(_older(path), moved)}")
    return path


def _not_there(path: Path) -> str | None:
    """Why ``path`` is no directory; None if it is one."""
    try:
        return None if path.is_dir() else "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def verify(directory: Path, world: World) -> dict[str, Any]:
    """Check every file of a checkpoint against its saved hash, the ranks sharing the work; returns the trainer state.

    Raises:
        CheckpointError: names each damaged file, and the next older whole checkpoint.
    """
    state, problems = _examine(directory, sorted, world)
    if problems:
        offer = world.on_main(_offer(_older(directory), world.activity.move) if world.is_main else None)
        raise CheckpointError("; ".join(problems) + offer)
    return state


def check_undamaged(directory: Path, world: World | None = None) -> None:
    """Compare the exported model in a run's checkpoint with the hashes that were saved; other directories have none.

    Args:
        directory: of the model.
        world: all of its ranks call this and share the work; None: this process alone.

    Raises:
        CheckpointError: names each file that is missing or not as it was saved.
    """
    world = world or World(0, 1, torch.device("cpu"))
    # Hosts may have copies of their own: a rank whose copy lacks the file meets the others, and says so.
    if not world.any((directory / STATE_FILE).is_file()):
        return
    _, problems = _examine(directory, _of_model, world)
    if problems:
        raise CheckpointError(f"{'; '.join(problems)}. A model that was changed on purpose is taken without its {STATE_FILE}")


def _of_model(files: Iterable[str]) -> list[str]:
    """Of the files of a checkpoint those of the exported model, which lie at its top."""
    return sorted(name for name in files if Path(name).name == name)


def _examine(directory: Path, choose: Callable[[Iterable[str]], list[str]], world: World) -> tuple[dict[str, Any], list[str]]:
    """The trainer state, and what all ranks found to be wrong with it and the files that ``choose`` takes, each of them its share."""
    problems: list[str] = []
    state: dict[str, Any] = {}
    try:
        state = read_state(directory)
    except CheckpointError as error:
        problems.append(str(error))
    else:
        problems = damaged_files(directory, state["files"], choose(state["files"])[world.rank :: world.size], world.activity.move)
    return state, list(dict.fromkeys(message for messages in world.gather(problems) for message in messages))


def _older(damaged: Path) -> list[Path]:
    """Checkpoints beside ``damaged`` that were saved before it."""
    return [path for path in saved_steps(damaged.parent) if plain_name(path) < plain_name(damaged)]


def _offer(candidates: list[Path], moved: Callable[[], None]) -> str:
    """A sentence that names the newest whole checkpoint among ``candidates`` (oldest first), or says that there is none."""
    for path in reversed(candidates):
        try:
            state = read_state(path)
        except CheckpointError:
            continue
        if not damaged_files(path, state["files"], state["files"], moved):
            return f". The next older whole checkpoint is {path}: resume from it with checkpoint.resume={path}"
    return ". There is no older whole checkpoint"


def load_optimizer(directory: Path, optimizer: SavedOptimizer, world: World) -> list[StateChange]:
    """Restore master weights and moments, and from them the parameters of all ranks, whatever the grid that saved them.

    Returns:
        What of the state of all ranks could not be kept, because other rules made it.

    Raises:
        CheckpointError: the parameters of the checkpoint are not those of the model.
    """
    reader = OwnedStateReader(directory)

    def read(part: OwnedBox) -> dict[str, torch.Tensor]:
        world.activity.move()
        return reader(part)

    saved = reader.shapes
    shapes = {name: placement.shape for name, placement in optimizer.placements.items()}
    held = {name for names in world.gather(sorted(shapes)) for name in names}
    if saved.keys() != held:
        missing, unexpected = sorted(held - saved.keys())[:3], sorted(saved.keys() - held)[:3]
        raise CheckpointError(
            f"{directory}: the checkpoint is of another model: it lacks {missing} and has {unexpected} (first three of each)"
        )
    wrong = [
        f"{name} is {list(saved[name])} in the checkpoint, {list(shape)} in the model"
        for name, shape in shapes.items()
        if saved[name] != shape
    ]
    problems = [problem for problems in world.gather(wrong) for problem in problems]
    if problems:
        raise CheckpointError(f"{directory}: {problems[0]}")
    changes = optimizer.load_owned_state(read)
    return [StateChange(*change) for of_rank in world.gather(changes) for change in of_rank]
