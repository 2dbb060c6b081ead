"""Write a checkpoint: every rank its part, beside the final place; then hashes, one rename, and ``latest``."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ext.atomic_io import fsync_file, write_json
from megatron_ext.checkpoint import hf
from megatron_ext.checkpoint.directory import begin, keep_newest, publish
from megatron_ext.checkpoint.manifest import STATE_FILE, Entry, file_entry, seal
from megatron_ext.checkpoint.optimizer_state import FOLDER, INDEX, index_of, write_owned
from megatron_ext.errors import CheckpointError
from megatron_ext.optim.sharded import ShardedOptimizer
from megatron_ext.parallel.world import World


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes checkpoints of one run.

    Args:
        root: directory that holds the run's checkpoints.
        hf_config: contents of ``config.json``.
        copy_tokenizer: puts the tokenizer's files into a directory.
        keep_last: newest checkpoints to keep.
        max_shard_bytes: largest safetensors file of the exported model.
    """

    root: Path
    world: World
    hf_config: dict[str, Any]
    copy_tokenizer: Callable[[Path], None]
    keep_last: int
    max_shard_bytes: int

    def save(self, step: int, model: torch.nn.Module, optimizer: ShardedOptimizer, state: dict[str, Any]) -> Path:
        """Save step ``step``; returns the directory. All ranks call it; all raise if one fails, and the older checkpoints stay.

        Raises:
            CheckpointError: a file could not be written (disk full, permissions), with the rank and the reason.
        """
        beside = Path(self.world.on_main(self._on_main(lambda: str(begin(self.root, step)))))
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        files, entries = self._together(lambda: self._write_part(beside, weights, optimizer))
        self._on_main(lambda: self._finish(beside, step, weights, files, entries, state))
        return Path(self.world.on_main(self._on_main(lambda: str(self._publish(beside, step)))))

    def _write_part(self, beside: Path, weights: dict[str, torch.Tensor], optimizer: ShardedOptimizer) -> list[Any]:
        """Write this rank's files; returns them with their hashes, and the index entries of the owned rows."""
        written: list[str] = []
        plan = hf.shard_plan(_sizes(weights), self.max_shard_bytes)
        for number, (file, names) in enumerate(zip(hf.shard_file_names(len(plan)), plan, strict=True)):
            if number % self.world.size == self.world.rank:
                hf.write_safetensors(beside / file, {name: weights[name].cpu().contiguous() for name in names}, {"format": "pt"})
                written.append(file)
        owned, entries = write_owned(optimizer.owned_state(), beside, self.world.rank, self.world.size)
        written += [owned] if owned else []
        return [_flush(beside, written), entries]

    def _finish(self, beside: Path, step: int, weights: dict[str, torch.Tensor], files: dict, entries: list, state: dict) -> None:
        """Write what exists once: configuration, tokenizer, indices, and last the trainer state with every file's hash."""
        write_json(beside / "config.json", self.hf_config)
        self.copy_tokenizer(beside)
        write_json(beside / FOLDER / INDEX, index_of(entries))
        plan = hf.shard_plan(_sizes(weights), self.max_shard_bytes)
        if len(plan) > 1:
            write_json(beside / hf.INDEX, hf.shard_index(plan, _sizes(weights)))
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


def _sizes(weights: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: tensor.numel() * tensor.element_size() for name, tensor in weights.items()}


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
