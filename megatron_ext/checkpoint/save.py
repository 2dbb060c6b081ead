"""Write a checkpoint: every rank its part, beside the final place; then hashes, one rename, and ``latest``."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_ext.atomic_io import fsync_file, write_json
from megatron_ext.checkpoint import hf
from megatron_ext.checkpoint.directory import begin, keep_newest, publish
from megatron_ext.checkpoint.manifest import STATE_FILE, Entry, file_entry, seal
from megatron_ext.checkpoint.optimizer_state import FOLDER, INDEX, index_of, write_owned
from megatron_ext.checkpoint.weight_files import WeightFile, plan_weight_files, write_weight_files
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
class CheckpointWriter:
    """Writes checkpoints of one run.

    Args:
        root: directory that holds the run's checkpoints.
        grid: the ranks.
        hf_config: contents of ``config.json``.
        copy_tokenizer: puts the tokenizer's files into a directory.
        keep_last: newest checkpoints to keep.
        max_shard_bytes: largest safetensors file of the exported model.
    """

    root: Path
    grid: Grid
    hf_config: dict[str, Any]
    copy_tokenizer: Callable[[Path], None]
    keep_last: int
    max_shard_bytes: int

    def save(self, step: int, weight: Callable[[str], torch.Tensor], optimizer: SavedOptimizer, state: dict[str, Any]) -> Path:
        """Save step ``step``; returns the directory. All ranks call it; all raise if one fails, and the older checkpoints stay.

        Args:
            step: number of the step.
            weight: this rank's part of a parameter in the dtype of the export; all ranks of a stage ask for the same ones in turn.
            optimizer: says which parameters there are and yields what this rank saves of them.
            state: of the trainer, as JSON values.

        Raises:
            CheckpointError: a file could not be written (disk full, permissions), with the rank and the reason.
        """
        beside = Path(self.world.on_main(self._on_main(lambda: str(begin(self.root, step)))))
        itemsize = DTYPES[self.hf_config["dtype"]].itemsize
        plan = plan_weight_files(optimizer.placements, self.grid, itemsize, self.max_shard_bytes)
        files, entries = self._together(lambda: self._write_part(beside, plan, weight, optimizer))
        self._on_main(lambda: self._finish(beside, step, plan, itemsize, files, entries, state))
        return Path(self.world.on_main(self._on_main(lambda: str(self._publish(beside, step)))))

    @property
    def world(self) -> World:
        """All ranks."""
        return self.grid.world

    def _write_part(
        self, beside: Path, plan: list[WeightFile], weight: Callable[[str], torch.Tensor], optimizer: SavedOptimizer
    ) -> list[Any]:
        """Write this rank's files; returns them with their hashes, and the index entries of the parts that it saves."""
        written = write_weight_files(plan, beside, weight, optimizer.placements, self.grid)
        owned, entries = write_owned(optimizer.owned_state(), beside, self.world.rank, self.world.size)
        written += [owned] if owned else []
        return [{file: file_entry(beside / file) for file in written}, entries]

    def _finish(self, beside: Path, step: int, plan: list[WeightFile], itemsize: int, files: dict, entries: list, state: dict) -> None:
        """Write what exists once: configuration, tokenizer, indices, and last the trainer state with every file's hash."""
        write_json(beside / "config.json", self.hf_config)
        self.copy_tokenizer(beside)
        shapes = {name: shape for file in plan for name, shape in file.shapes.items()}
        write_json(beside / FOLDER / INDEX, index_of(entries, {name: list(shape) for name, shape in shapes.items()}))
        if len(plan) > 1:
            sizes = {name: shape.numel() * itemsize for name, shape in shapes.items()}
            write_json(beside / hf.INDEX, hf.shard_index([list(file.shapes) for file in plan], sizes))
        present = {str(path.relative_to(beside)) for path in beside.rglob("*") if path.is_file()}
        files = {**files, **_flush(beside, sorted(present - files.keys()))}
        write_json(beside / STATE_FILE, seal(json.loads(json.dumps({**state, "step": step, "files": dict(sorted(files.items()))}))))

    def _publish(self, beside: Path, step: int) -> Path:
        final = publish(self.root, beside, step)
        keep_newest(self.root, self.keep_last)
        return final

    def _on_main(self, action: Callable[[], Any]) -> Any:
        """Run ``action`` on rank 0; raise on every rank if it fails there."""
        result, error = _attempt(action) if self.world.is_main else (None, None)
        if error := self.world.on_main(error):
            raise CheckpointError(error)
        return result

    def _together(self, action: Callable[[], list[Any]]) -> tuple[dict[str, Entry], list[dict[str, Any]]]:
        """Run ``action`` on every rank and merge the files and entries; raise on every rank if it fails on one."""
        results = self.world.gather(_attempt(action))
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(results) if error]
        if errors:
            raise CheckpointError("; ".join(errors))
        files = {file: entry for (part, _), _ in results for file, entry in part.items()}
        return files, [entry for (_, entries), _ in results for entry in entries]


def _attempt(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """(result, None), or (None, message): what went wrong travels to all ranks before anyone raises."""
    try:
        return action(), None
    except Exception as error:
        return None, f"cannot save the checkpoint: {type(error).__name__}: {error}"


def _flush(directory: Path, files: list[str]) -> dict[str, Entry]:
    """Flush files to disk and hash them."""
    for file in files:
        fsync_file(directory / file)
    return {file: file_entry(directory / file) for file in files}
