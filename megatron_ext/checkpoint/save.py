"""Write a checkpoint: every rank its part, beside the final place; then hashes, one rename, and ``latest``."""

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_ext.atomic_io import fsync_file, write_json
from megatron_ext.checkpoint import hf
from megatron_ext.checkpoint.amend import amend_state
from megatron_ext.checkpoint.attempts import Attempt, attempt, do_on_main, failure
from megatron_ext.checkpoint.directory import Eviction, begin, keep_newest, plain_name, publish
from megatron_ext.checkpoint.manifest import STATE_FILE, Entry, file_entry, seal
from megatron_ext.checkpoint.optimizer_state import FOLDER, INDEX, OwnedFile, index_of, owned_file
from megatron_ext.checkpoint.weight_files import WeightFile, copy_weight_files, plan_weight_files, write_copies, write_weight_files
from megatron_ext.errors import CheckpointError
from megatron_ext.optim.ownership import OwnedBox
from megatron_ext.optim.state_change import StateChange
from megatron_ext.parallel.device import DTYPES
from megatron_ext.parallel.grid import Grid
from megatron_ext.parallel.placement import Placement
from megatron_ext.parallel.world import World


class SavedOptimizer(Protocol):
    """An optimizer as a checkpoint sees it; ``ShardedOptimizer`` is one."""

    placements: Mapping[str, Placement]

    def owned_state(self) -> Iterator[tuple[OwnedBox, dict[str, torch.Tensor]]]:
        """What this rank is to save: parts with ``master`` and the rule's state, by kind."""

    def load_owned_state(self, read: Callable[[OwnedBox], dict[str, torch.Tensor]]) -> list[StateChange]:
        """Replace this rank's parts by what ``read`` returns for them, then every rank's parameters; returns what could not be kept."""


@dataclass(frozen=True)
class SaveJob:
    """A save that has begun: where it goes and what this rank writes."""

    step: int
    beside: Path
    plan: list[WeightFile]
    state: dict[str, Any]
    """Of the trainer, when the save began."""
    owned: OwnedFile
    write_weights: Callable[[], list[str]]
    """Writes this rank's files of weights; returns their names."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is in its place."""

    path: Path
    evicted: list[str]
    """Names of the older ones that were removed for it."""
    not_removed: list[str]
    """What else was to be removed and could not be, and why."""
    num_bytes: int
    """Of all its files."""
    seconds: float
    """Of writing: the slowest rank's part, and what is written once."""


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes checkpoints of one run.

    Args:
        root: directory that holds the run's checkpoints.
        grid: the ranks.
        hf_config: contents of ``config.json``.
        copy_tokenizer: puts the tokenizer's files into a directory.
        keep_last: newest checkpoints to keep.
        max_shard_bytes: largest safetensors file of the exported model.
        keep_every: checkpoints of steps that it divides are kept, too; None: none.
        confirm: raises if this run may not write to ``root`` any more. Called on rank 0 before anything there changes.
        flush_records: puts on disk what the run has written of itself up to this step, without which a checkpoint must not be there. Called
            on rank 0 when a save begins.
    """

    root: Path
    grid: Grid
    hf_config: dict[str, Any]
    copy_tokenizer: Callable[[Path], None]
    keep_last: int
    max_shard_bytes: int
    keep_every: int | None = None
    confirm: Callable[[], None] = lambda: None
    flush_records: Callable[[], None] = lambda: None

    def save(self, step: int, weight: Callable[[str], torch.Tensor], optimizer: SavedOptimizer, state: dict[str, Any]) -> Saved:
        """Save step ``step``. All ranks call it; all raise if one fails, and then the older checkpoints stay and nothing of this one does.

        Args:
            step: number of the step.
            weight: this rank's part of a parameter in the dtype of the export; all ranks of a stage ask for the same ones in turn.
            optimizer: says which parameters there are and yields what this rank saves of them.
            state: of the trainer, as JSON values.

        Raises:
            StorageError: a file could not be written (disk full, permissions), with the rank and the reason.
            NonFiniteError: a master or an exported weight is not finite.
            CheckpointError: anything else went wrong.
        """
        job = self.begin(step, weight, optimizer, state)
        parts = self.gather(job, attempt(lambda: self.write_part(job)))
        return self.settle(job, parts, attempt(lambda: self.publish(job, parts)) if self.world.is_main else None)

    def begin(
        self, step: int, weight: Callable[[str], torch.Tensor], optimizer: SavedOptimizer, state: dict[str, Any], copied: bool = False
    ) -> SaveJob:
        """Decide what each rank writes, and where. All ranks call it; arguments and errors as of ``save``.

        Args:
            copied: take copies of the values now. ``write_part`` and ``publish`` then speak to no other rank, and may be called from a
                thread while the model changes.
        """
        made = self._agree(attempt(lambda: self._make_directory(step)) if self.world.is_main else None)
        beside, placements = Path(made.result), optimizer.placements
        plan = plan_weight_files(placements, self.grid, self._itemsize, self.max_shard_bytes)
        owned = owned_file(self.world.activity.each(optimizer.owned_state()), self.world.rank, self.world.size)
        state = json.loads(json.dumps({**state, "step": step}))
        if copied:
            copies = copy_weight_files(plan, weight, placements, self.grid)
            return SaveJob(step, beside, plan, state, owned.copied(), lambda: write_copies(copies, beside, self.world.activity.move))
        return SaveJob(step, beside, plan, state, owned, lambda: write_weight_files(plan, beside, weight, placements, self.grid))

    def write_part(self, job: SaveJob) -> dict[str, Any]:
        """Write this rank's files; returns them with their hashes, and the index entries of the parts that it saves."""
        moved = self.world.activity.move
        written = job.write_weights() + job.owned.write(job.beside, moved)
        return {"files": {file: file_entry(job.beside / file, moved) for file in written}, "entries": job.owned.entries}

    def gather(self, job: SaveJob, part: Attempt) -> list[Attempt]:
        """What ``write_part`` came to on every rank, by rank. All ranks call it; all raise if one failed."""
        parts = [Attempt(**each) for each in self.world.gather(asdict(part))]
        self._raise_failure(job, {f"rank {rank}": each for rank, each in enumerate(parts)})
        return parts

    def publish(self, job: SaveJob, parts: list[Attempt]) -> dict[str, Any]:
        """Rank 0: write what exists once, put the checkpoint in its place, and remove older ones."""
        files = self._finish(job, parts)
        self.confirm()
        path = publish(self.root, job.beside, job.step)
        eviction = self._evict()
        evicted = [plain_name(each) for each in eviction.removed]
        num_bytes = sum(entry["bytes"] for entry in files.values())
        return {"path": str(path), "evicted": evicted, "not_removed": eviction.problems, "num_bytes": num_bytes}

    def settle(self, job: SaveJob, parts: list[Attempt], published: Attempt | None) -> Saved:
        """What ``publish`` came to on rank 0, which passes it. All ranks call it; all raise if it failed."""
        outcome = self._agree(published, job)
        seconds = max(part.seconds for part in parts) + outcome.seconds
        return Saved(**{**outcome.result, "path": Path(outcome.result["path"]), "seconds": seconds})

    def amend(self, directory: Path, changes: Mapping[str, Any]) -> None:
        """Replace values of the trainer's state in a saved checkpoint, once the records that tell of the change are on disk.

        All ranks call it; all raise CheckpointError if it fails.
        """

        def amend() -> None:
            self.confirm()
            self.flush_records()
            amend_state(directory, changes)

        do_on_main(self.world, amend, "amend the checkpoint")

    @property
    def world(self) -> World:
        """All ranks."""
        return self.grid.world

    @property
    def _itemsize(self) -> int:
        return DTYPES[self.hf_config["dtype"]].itemsize

    def _make_directory(self, step: int) -> str:
        self.confirm()
        self.flush_records()
        return str(begin(self.root, step, self.world.activity.move))

    def _evict(self) -> Eviction:
        """Remove what is not kept. The new checkpoint is in its place: whatever happens here is no failure of the save."""
        try:
            return keep_newest(self.root, self.keep_last, self.keep_every, self.world.activity.move)
        except (OSError, CheckpointError) as error:
            return Eviction([], [f"{self.root}: {error}"])

    def _finish(self, job: SaveJob, parts: list[Attempt]) -> dict[str, Entry]:
        """Write configuration, tokenizer, indices, and last the trainer state with every file's hash; returns all others with theirs."""
        beside = job.beside
        write_json(beside / "config.json", self.hf_config)
        self.copy_tokenizer(beside)
        shapes = {name: shape for file in job.plan for name, shape in file.shapes.items()}
        entries = [entry for part in parts for entry in part.result["entries"]]
        write_json(beside / FOLDER / INDEX, index_of(entries, {name: list(shape) for name, shape in shapes.items()}))
        if len(job.plan) > 1:
            sizes = {name: shape.numel() * self._itemsize for name, shape in shapes.items()}
            write_json(beside / hf.INDEX, hf.shard_index([list(file.shapes) for file in job.plan], sizes))
        files = {file: entry for part in parts for file, entry in part.result["files"].items()}
        present = {str(path.relative_to(beside)) for path in beside.rglob("*") if path.is_file()}
        files |= _flush(beside, sorted(present - files.keys()))
        write_json(beside / STATE_FILE, seal({**job.state, "files": dict(sorted(files.items()))}))
        return files

    def _agree(self, on_main: Attempt | None, job: SaveJob | None = None) -> Attempt:
        """What rank 0 attempted, on every rank; all raise if it failed."""
        outcome = Attempt(**self.world.on_main(None if on_main is None else asdict(on_main)))
        self._raise_failure(job, {"": outcome})
        return outcome

    def _raise_failure(self, job: SaveJob | None, attempts: dict[str, Attempt]) -> None:
        """Where one of ``attempts``, which all ranks know, failed: remove what was written, and raise on all ranks."""
        error = failure(attempts)
        if error is not None and job is not None:
            of_all = sum(self.world.gather(job.owned.num_bytes))
            no_space = any(each.errno in (errno.ENOSPC, errno.EDQUOT) for each in attempts.values())
            more = self.world.on_main(self._give_up(job, of_all, no_space) if self.world.is_main else None)
            raise type(error)(f"{error}{more}")
        if error is not None:
            raise error

    def _give_up(self, job: SaveJob, owned_bytes: int, no_space: bool) -> str:
        """Remove the unfinished directory; returns what there is to say of that, and of space where it was missing."""
        shutil.rmtree(job.beside, ignore_errors=True)
        left = f". {job.beside} could not be removed" if job.beside.exists() else ""
        if not no_space:
            return left
        needed = owned_bytes + sum(shape.numel() for file in job.plan for shape in file.shapes.values()) * self._itemsize
        try:
            free = f"{shutil.disk_usage(self.root).free / 2**20:,.1f} MiB free"
        except OSError as error:
            free = f"an unknown room ({error.strerror})"
        return f"{left}. The checkpoint needs {needed / 2**20:,.1f} MiB; without it {self.root} has {free}. The older checkpoints are kept"


def _flush(directory: Path, files: list[str]) -> dict[str, Entry]:
    """Flush files to disk and hash them."""
    for file in files:
        fsync_file(directory / file)
    return {file: file_entry(directory / file) for file in files}
