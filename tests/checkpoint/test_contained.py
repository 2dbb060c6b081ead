"""Names and links that lead out of a checkpoint are refused before anything is opened; links to a checkpoint are not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_ext.checkpoint.contained import is_contained
from megatron_ext.checkpoint.hf import load_hf_config, load_hf_weights, save_hf
from megatron_ext.checkpoint.load import find_checkpoint, load_optimizer, verify
from megatron_ext.checkpoint.manifest import STATE_FILE, file_entry, seal
from megatron_ext.checkpoint.optimizer_state import OwnedStateReader
from megatron_ext.errors import CheckpointError
from megatron_ext.model.gpt import GPT
from tests.checkpoint.tiny_state import CONFIG, trained, weight_of, writer
from tests.grids import ALONE

STATE = {"tokens": 1}
OUTSIDE = ("../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors", "", ".", 3, None, "a\0b", "link.safetensors", "folder/x")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model, optimizer = trained()
    return writer(tmp_path / "run").save(1, weight_of(model), optimizer, STATE).path


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    model = GPT(CONFIG, "sdpa")
    model.reset_parameters(0)
    save_hf(model.named_parameters(), CONFIG, tmp_path / "model", max_shard_bytes=8192, dtype=torch.float32)
    return tmp_path / "model"


def edited(path: Path, edit: Callable[[dict], None]) -> None:
    values = json.loads(path.read_text("utf-8"))
    edit(values)
    path.write_text(json.dumps(values), "utf-8")


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_leads_out_is_not_contained(tmp_path: Path, name: object) -> None:
    inside = tmp_path / "checkpoint"
    inside.mkdir()
    (tmp_path / "secret.safetensors").touch()
    (inside / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (inside / "folder").symlink_to(tmp_path)
    assert is_contained(inside, name) == (name == ".")
    assert is_contained(inside, "there/or.not")


@pytest.mark.parametrize("name", [name for name in OUTSIDE if isinstance(name, str) and name not in ("", ".", "folder/x")])
def test_an_optimizer_index_cannot_name_other_files(checkpoint: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.zeros(1)}, checkpoint.parent / "secret.safetensors")
    (checkpoint / "link.safetensors").symlink_to(checkpoint.parent / "secret.safetensors")
    index = checkpoint / "optimizer/index.json"
    edited(index, lambda values: values["parameters"]["model.norm.weight"]["parts"][0].update(file=name))
    monkeypatch.setattr("megatron_ext.checkpoint.optimizer_state.safe_open", pytest.fail)
    with pytest.raises(CheckpointError, match=r"index\.json: model\.norm\.weight, part 0: file: .*of this checkpoint"):
        OwnedStateReader(checkpoint)


def test_a_state_cannot_list_other_files(checkpoint: Path) -> None:
    outside = checkpoint.parent / "secret.safetensors"
    save_file({"a": torch.zeros(1)}, outside)
    (checkpoint / "link.safetensors").symlink_to(outside)
    for name in ("../secret.safetensors", "link.safetensors", str(outside)):
        state = json.loads((checkpoint / STATE_FILE).read_text("utf-8"))
        state["files"] = {name: file_entry(outside)}
        (checkpoint / STATE_FILE).write_text(json.dumps(seal(state)), "utf-8")
        with pytest.raises(CheckpointError, match="outside the checkpoint"):
            verify(checkpoint, ALONE)


def test_a_link_in_a_model_cannot_lead_out_but_into_the_blobs_of_a_cache(model_dir: Path, tmp_path: Path) -> None:
    cache, model = tmp_path / "models--a--b", GPT(CONFIG, "sdpa")
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(model_dir.iterdir())):
        path.rename(cache / "blobs" / str(number))
        (snapshot / path.name).symlink_to(cache / "blobs" / str(number))
        path.symlink_to(cache / "blobs" / str(number))
    load_hf_weights(model, snapshot)
    with pytest.raises(CheckpointError, match="a link that leads out"):
        load_hf_weights(model, model_dir)


def test_links_to_directories_and_directories_that_are_read_only_serve(checkpoint: Path, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "to_run").symlink_to(checkpoint.parent)
    (tmp_path / "to_model").symlink_to(model_dir)
    for directory in (checkpoint, checkpoint / "optimizer", checkpoint.parent, model_dir):
        directory.chmod(0o555)
    try:
        path = find_checkpoint(tmp_path / "to_run", "auto")
        assert path is not None and verify(path, ALONE)["step"] == 1
        load_optimizer(path, trained(steps=0)[1], ALONE)
        load_hf_weights(GPT(load_hf_config(tmp_path / "to_model"), "sdpa"), tmp_path / "to_model")
    finally:
        for directory in (checkpoint.parent, checkpoint, checkpoint / "optimizer", model_dir):
            directory.chmod(0o755)
