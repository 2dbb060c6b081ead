"""Master weights and moments on disk, indexed by (name, rows) and never by rank.

``optimizer/owned-*.safetensors`` hold tensors named ``<parameter>|<kind>|<start>:<stop>``; ``optimizer/index.json`` says which file has
which rows. Any rank of any later run reads just the rows that it owns then.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_ext.errors import CheckpointError
from megatron_ext.optim.ownership import OwnedRows

FOLDER = "optimizer"
INDEX = "index.json"
OwnedState = tuple[OwnedRows, dict[str, torch.Tensor]]


def write_owned(state: Iterable[OwnedState], directory: Path, rank: int, size: int) -> tuple[str | None, list[dict[str, Any]]]:
    """Write the rows that one rank owns.

    Args:
        state: rows with their tensors by kind: row blocks (``master`` and moments) and scalars (``step``).
        directory: of the checkpoint.
        rank: number of this file among ``size``.

    Returns:
        The file's path relative to ``directory`` (None if the rank owns nothing), and its entries for the index.
    """
    tensors: dict[str, torch.Tensor] = {}
    entries = []
    file = f"{FOLDER}/owned-{rank + 1:05d}-of-{size:05d}.safetensors"
    for rows, values in state:
        blocks = {kind: t for kind, t in values.items() if t.shape == values["master"].shape}
        scalars = {kind: t.item() for kind, t in values.items() if kind not in blocks}
        for kind, tensor in blocks.items():
            tensors[_key(rows.name, kind, rows.start, rows.stop)] = tensor.detach().cpu().contiguous()
        entries.append({"name": rows.name, "rows": [rows.start, rows.stop], "file": file, "kinds": sorted(blocks), "scalars": scalars})
    if not entries:
        return None, []
    save_file(tensors, directory / file)
    return file, entries


def index_of(entries: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Contents of ``optimizer/index.json`` from the entries of all ranks."""
    parameters: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        parameters.setdefault(entry["name"], []).append({key: value for key, value in entry.items() if key != "name"})
    return {"format": 1, "parameters": parameters}


class OwnedStateReader:
    """Reads any rows of any parameter from a checkpoint's ``optimizer/`` folder.

    Raises:
        CheckpointError: on construction and on reading, if the index or a file is unusable or rows are missing.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        path = directory / FOLDER / INDEX
        try:
            index = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        if index.get("format") != 1:
            raise CheckpointError(f"{path}: format is {index.get('format')!r}; this version reads 1")
        self._parameters: dict[str, list[dict[str, Any]]] = index["parameters"]

    @property
    def rows(self) -> dict[str, int]:
        """Rows of each parameter of the checkpoint, by name."""
        return {name: max(entry["rows"][1] for entry in entries) for name, entries in self._parameters.items()}

    def __call__(self, rows: OwnedRows) -> dict[str, torch.Tensor]:
        """Tensors of these rows by kind, and scalars as tensors without dimensions."""
        parts = [
            (entry, max(rows.start, entry["rows"][0]), min(rows.stop, entry["rows"][1])) for entry in self._parameters.get(rows.name, [])
        ]
        parts = sorted((part for part in parts if part[1] < part[2]), key=lambda part: part[1])
        if sum(stop - start for _, start, stop in parts) != rows.stop - rows.start:
            raise CheckpointError(f"{self._directory / FOLDER}: rows {rows.start} to {rows.stop} of {rows.name} are not all there")
        values = {
            kind: _joined([self._read(entry, rows.name, kind, start, stop) for entry, start, stop in parts])
            for kind in parts[0][0]["kinds"]
        }
        return values | {kind: torch.tensor(value) for kind, value in parts[0][0]["scalars"].items()}

    def _read(self, entry: dict[str, Any], name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        first, last = entry["rows"]
        path = self._directory / entry["file"]
        try:
            with safe_open(path, framework="pt") as file:
                saved = file.get_slice(_key(name, kind, first, last))
                return saved[start - first : stop - first] if saved.get_shape() else saved[...]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {name} ({kind}): {error}") from error


def _joined(blocks: list[torch.Tensor]) -> torch.Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _key(name: str, kind: str, start: int, stop: int) -> str:
    return f"{name}|{kind}|{start}:{stop}"
