"""Read a checkpoint: verify every file first, then only the rows that this rank owns."""

from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.directory import latest, saved_steps
from megatron_ext.checkpoint.manifest import damaged_files, read_state
from megatron_ext.checkpoint.optimizer_state import OwnedStateReader
from megatron_ext.errors import CheckpointError
from megatron_ext.optim.sharded import ShardedOptimizer
from megatron_ext.parallel.world import World


def find_checkpoint(root: Path, resume: str) -> Path | None:
    """The checkpoint to resume from.

    Args:
        root: directory that holds the run's checkpoints.
        resume: ``auto`` (the latest in ``root``, or None if there is none), ``never``, or a checkpoint directory.

    Raises:
        CheckpointError: the directory does not exist, or ``latest`` does not say which it is; names the next older whole checkpoint.
    """
    if resume == "never":
        return None
    try:
        path = latest(root) if resume == "auto" else Path(resume)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_offer(saved_steps(root))}") from error
    if path is not None and not path.is_dir():
        raise CheckpointError(f"{path} is missing{_offer(_older(path))}")
    return path


def verify(directory: Path, world: World) -> dict[str, Any]:
    """Check every file of a checkpoint against its saved hash, the ranks sharing the work; returns the trainer state.

    Raises:
        CheckpointError: names each damaged file, and the next older whole checkpoint.
    """
    problems: list[str] = []
    state: dict[str, Any] = {}
    try:
        state = read_state(directory)
    except CheckpointError as error:
        problems.append(str(error))
    else:
        problems = damaged_files(directory, state["files"], sorted(state["files"])[world.rank :: world.size])
    problems = list(dict.fromkeys(message for messages in world.gather(problems) for message in messages))
    if problems:
        offer = world.on_main(_offer(_older(directory)) if world.is_main else None)
        raise CheckpointError("; ".join(problems) + offer)
    return state


def _older(damaged: Path) -> list[Path]:
    """Checkpoints beside ``damaged`` that were saved before it."""
    return [path for path in saved_steps(damaged.parent) if path.name < damaged.name]


def _offer(candidates: list[Path]) -> str:
    """A sentence that names the newest whole checkpoint among ``candidates`` (oldest first), or says that there is none."""
    for path in reversed(candidates):
        try:
            state = read_state(path)
        except CheckpointError:
            continue
        if not damaged_files(path, state["files"], state["files"]):
            return f". The next older whole checkpoint is {path}: resume from it with checkpoint.resume={path}"
    return ". There is no older whole checkpoint"


def load_optimizer(directory: Path, optimizer: ShardedOptimizer) -> None:
    """Restore master weights and moments, and from them the parameters of all ranks.

    Raises:
        CheckpointError: the parameters of the checkpoint are not those of the model.
    """
    reader = OwnedStateReader(directory)
    saved, rows = reader.rows, optimizer.parameter_rows
    if saved.keys() != rows.keys():
        missing, unexpected = sorted(rows.keys() - saved.keys())[:3], sorted(saved.keys() - rows.keys())[:3]
        raise CheckpointError(
            f"{directory}: the checkpoint is of another model: it lacks {missing} and has {unexpected} (first three of each)"
        )
    for name, count in rows.items():
        if saved[name] != count:
            raise CheckpointError(f"{directory}: {name} has {saved[name]} rows in the checkpoint, {count} in the model")
    optimizer.load_owned_state(reader)
