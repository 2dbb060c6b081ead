import errno
import hashlib
import json
import os
from pathlib import Path
from unittest import mock

import pytest

from megatron_ext.checkpoint import manifest
from megatron_ext.checkpoint.manifest import damaged_files, file_entry, read_state, seal
from megatron_ext.errors import CheckpointError

STATE = {"step": 3, "data": {"cursors": {"ü": [1, 2.5]}}, "files": {}}


def test_an_entry_is_size_and_hash(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert file_entry(tmp_path / "file") == {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}


def test_large_files_are_read_in_pieces_each_of_which_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_CHUNK_BYTES", 4)
    (tmp_path / "file").write_bytes(b"abcdefghi")
    moves: list[int] = []
    entry = file_entry(tmp_path / "file", lambda: moves.append(1))
    assert entry == {"bytes": 9, "sha256": hashlib.sha256(b"abcdefghi").hexdigest()} and len(moves) == 3
    assert damaged_files(tmp_path, {"file": entry}, ["file"], lambda: moves.append(1)) == [] and len(moves) == 6


def test_a_sealed_state_is_read_back_whatever_its_layout(tmp_path: Path) -> None:
    for indent in (None, 4):
        (tmp_path / "trainer_state.json").write_text(json.dumps(seal(STATE), indent=indent), "utf-8")
        assert {key: value for key, value in read_state(tmp_path).items() if key != "sha256"} == STATE


@pytest.mark.parametrize("change", [{"step": 4}, {"more": 1}, {"sha256": ""}, {"data": {"cursors": {"ü": [1, 2.25]}}}])
def test_any_change_of_a_sealed_state_is_noticed(tmp_path: Path, change: dict) -> None:
    (tmp_path / "trainer_state.json").write_text(json.dumps({**seal(STATE), **change}), "utf-8")
    with pytest.raises(CheckpointError, match=r"trainer_state\.json is altered"):
        read_state(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\udcff", '{"step": 3}'])
def test_what_is_no_state_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "trainer_state.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"trainer_state\.json"):
        read_state(tmp_path)


def test_each_kind_of_damage_has_its_message(tmp_path: Path) -> None:
    for name in ("good", "short", "other", "gone"):
        (tmp_path / name).write_bytes(b"abc")
    files = {name: file_entry(tmp_path / name) for name in ("good", "short", "other", "gone")} | {"/etc/passwd": {}, "a/../b": {}}
    (tmp_path / "short").write_bytes(b"ab")
    (tmp_path / "other").write_bytes(b"abd")
    (tmp_path / "gone").unlink()
    assert damaged_files(tmp_path, files, ["good"]) == []
    messages = damaged_files(tmp_path, files, files)
    expected = [
        "short is truncated: 2 bytes, saved were 3",
        "other is altered",
        "gone is missing",
        "'/etc/passwd', which is outside",
        "'a/../b', which",
    ]
    assert len(messages) == len(expected) and all(text in message for text, message in zip(expected, messages, strict=True))


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["open", "stat"])
def test_what_cannot_be_read_is_damage(tmp_path: Path, number: int, name: str) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    files = {"file": file_entry(tmp_path / "file")}
    failing = mock.Mock(side_effect=OSError(number, os.strerror(number)))
    with mock.patch.object(manifest if name == "open" else Path, name, failing, create=True):
        assert damaged_files(tmp_path, files, ["file"]) == [f"{tmp_path / 'file'} cannot be read: {os.strerror(number)}"]
