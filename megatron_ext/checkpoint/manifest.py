"""What a whole checkpoint consists of: every file with its size and hash."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_ext.errors import CheckpointError

STATE_FILE = "trainer_state.json"
Entry = dict[str, Any]


def file_entry(path: Path) -> Entry:
    """Size in bytes and SHA-256 of a file."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def seal(state: dict[str, Any]) -> dict[str, Any]:
    """``state`` with a hash of itself, so that an altered trainer_state.json is noticed too."""
    return {**state, "sha256": _self_hash(state)}


def _self_hash(state: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in state.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_state(directory: Path) -> dict[str, Any]:
    """trainer_state.json of a checkpoint.

    Raises:
        CheckpointError: the file is missing, not JSON, or not as it was written.
    """
    path = directory / STATE_FILE
    try:
        state = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(state, dict) or state.get("sha256") != _self_hash(state):
        raise CheckpointError(f"{path} is altered: its contents do not have the hash that was saved with them")
    return state


def damaged_files(directory: Path, files: Mapping[str, Entry], names: Iterable[str]) -> list[str]:
    """What is wrong with the files ``names`` of a checkpoint, one message each; empty if nothing is."""
    messages = []
    for name in names:
        path, entry = directory / name, files[name]
        if Path(name).is_absolute() or ".." in Path(name).parts:
            messages.append(f"{directory / STATE_FILE} lists {name!r}, which is outside the checkpoint")
        elif not path.is_file():
            messages.append(f"{path} is missing")
        elif path.stat().st_size != entry["bytes"]:
            messages.append(f"{path} is truncated: {path.stat().st_size} bytes, saved were {entry['bytes']}")
        elif file_entry(path) != entry:
            messages.append(f"{path} is altered: its SHA-256 is not the one that was saved")
    return messages
