"""What a whole checkpoint consists of: every file with its size and hash."""

import hashlib
import json
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_ext.checkpoint.contained import is_contained
from megatron_ext.errors import CheckpointError
from megatron_ext.json_text import parse_json
from megatron_ext.option_rules import shown

STATE_FILE = "trainer_state.json"
Entry = dict[str, Any]
_CHUNK_BYTES = 2**24
_NEEDED = ("step", "files")
_KINDS: Mapping[str, tuple[type, str]] = MappingProxyType(
    {
        **dict.fromkeys(("step", "tokens", "skipped_steps", "updates"), (int, "a whole number")),
        **dict.fromkeys(("files", "tokens_by_source", "data", "settings"), (dict, "an object")),
        "rng": (str, "text"),
    }
)
"""Of what resuming reads, the kinds of its values."""


def file_entry(path: Path, moved: Callable[[], None] = lambda: None) -> Entry:
    """Size in bytes and SHA-256 of a file. ``moved`` is called while it is read, again and again."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            moved()
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


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
        state = parse_json(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(state, dict) or state.get("sha256") != _self_hash(state):
        raise CheckpointError(f"{path} is altered: its contents do not have the hash that was saved with them")
    for key, (kind, accepted) in _KINDS.items():
        if (key in state and type(state[key]) is not kind) or (key not in state and key in _NEEDED):
            raise CheckpointError(f"{path}: {key} is {shown(state.get(key))}; accepted: {accepted}")
    for name, entry in state["files"].items():
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise CheckpointError(f"{path}: files.{name} is {shown(entry)}; accepted: an object with bytes and sha256")
    return state


def damaged_files(directory: Path, files: Mapping[str, Entry], names: Iterable[str], moved: Callable[[], None] = lambda: None) -> list[str]:
    """What is wrong with the files ``names`` of a checkpoint, one message each; empty if nothing is. ``moved`` as of ``file_entry``."""
    messages = []
    for name in names:
        try:
            problem = _damage(directory, name, files[name], moved)
        except OSError as error:
            problem = f"{directory / name} cannot be read: {error.strerror or error}"
        if problem is not None:
            messages.append(problem)
    return messages


def _damage(directory: Path, name: str, entry: Entry, moved: Callable[[], None]) -> str | None:
    """What is wrong with a file. Raises OSError if that cannot be told."""
    path = directory / name
    if not is_contained(directory, name):
        return f"{directory / STATE_FILE} lists {name!r}, which is outside the checkpoint"
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return f"{path} is missing"
    if not stat.S_ISREG(status.st_mode):
        return f"{path} is no file"
    if status.st_size != entry["bytes"]:
        return f"{path} is truncated: {status.st_size} bytes, saved were {entry['bytes']}"
    return None if file_entry(path, moved) == entry else f"{path} is altered: its SHA-256 is not the one that was saved"
