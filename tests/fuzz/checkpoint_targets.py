"""Models and checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

from megatron_ext.checkpoint.hf import hf_tensor_reader, load_hf_config, load_hf_weights, save_hf
from megatron_ext.checkpoint.hf_config import config_to_hf
from megatron_ext.checkpoint.load import find_checkpoint, load_optimizer, verify
from megatron_ext.checkpoint.manifest import STATE_FILE, file_entry, seal
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT, parameter_shapes
from megatron_ext.model.norm_options import NormOptions
from megatron_ext.model.rope_options import RopeOptions
from megatron_ext.model.rope_scaling import resolve_rope
from tests.checkpoint.tiny_state import CONFIG, trained, weight_of, writer
from tests.fuzz.mutations import mutate_bytes, mutate_json, mutate_safetensors, structures
from tests.fuzz.target import Target
from tests.grids import ALONE

SHARDS = ("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors")


def _make_model(folder: Path) -> None:
    model = GPT(CONFIG, "sdpa")
    model.reset_parameters(0)
    save_hf(model.named_parameters(), CONFIG, folder, max_shard_bytes=8192, dtype=torch.float32)
    assert all((folder / name).exists() for name in SHARDS)


def _load_model(folder: Path, random: Random) -> None:
    config = load_hf_config(folder)
    model = GPT(config, "sdpa")
    load_hf_weights(model, folder)
    read = hf_tensor_reader(folder, config)
    for name, parameter in model.named_parameters():
        assert torch.equal(read(name).nan_to_num(), parameter.nan_to_num()), name


SAFETENSORS_TARGET = Target(_make_model, dict.fromkeys(SHARDS, mutate_safetensors), _load_model)
MODEL_INDEX_TARGET = Target(_make_model, {"model.safetensors.index.json": mutate_json}, _load_model)


def _make_config(config: ModelConfig) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(config_to_hf(config, dtype="float32")), "utf-8")

    return make


def _load_config(folder: Path, random: Random) -> None:
    config = load_hf_config(folder)
    assert parameter_shapes(config) and config.num_parameters() > 0
    json.dumps(config_to_hf(config, dtype="float32"))


def _shaped(norm: NormOptions | None = None) -> ModelConfig:
    theta, rope = resolve_rope(RopeOptions("yarn", factor=2.0, original_max_position=16), 10000.0, 4, 32)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    return ModelConfig(**sizes, head_dim=4, max_position=32, rope_theta=theta, rope=rope, norm=norm or NormOptions())


HF_CONFIG_TARGET = Target(_make_config(_shaped()), {"config.json": mutate_json}, _load_config)
OWN_CONFIG_TARGET = Target(_make_config(_shaped(NormOptions(kind="layer"))), {"config.json": mutate_json}, _load_config)


def _make_checkpoint(folder: Path) -> None:
    model, optimizer = trained()
    for step in (1, 2):
        state = {"tokens": 10, "tokens_by_source": {"a": 10}, "data": {"position": 3}, "rng": ""}
        writer(folder, max_shard_bytes=8192).save(step, weight_of(model), optimizer, state)


def _load_checkpoint(folder: Path, random: Random) -> None:
    if random.random() < 0.7:
        _seal_again(folder / "step_00000002")
    path = find_checkpoint(folder, "auto")
    assert path is not None
    state = verify(path, ALONE)
    assert isinstance(state["step"], int)
    load_optimizer(path, trained(steps=0)[1], ALONE)


def _seal_again(directory: Path) -> None:
    """Let spoilt files have the hashes that the state says, so that what reads them must find what is wrong."""
    try:
        state = json.loads((directory / STATE_FILE).read_text("utf-8"))
        state["files"] = {name: file_entry(directory / name) for name in state["files"]}
        sealed = json.dumps(seal(state))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    (directory / STATE_FILE).write_text(sealed, "utf-8")


def _mutate_state(random: Random, content: bytes) -> bytes:
    """A state that is as its hash says, or another."""
    if random.random() < 0.2:
        return mutate_json(random, content)
    state = json.loads(content)
    del state["sha256"]
    state = structures(random, state)
    return json.dumps(seal(state) if isinstance(state, dict) else state).encode()


NEWEST = "step_00000002"
CHECKPOINT_TARGET = Target(
    _make_checkpoint,
    {
        "latest": mutate_bytes,
        f"{NEWEST}/{STATE_FILE}": _mutate_state,
        f"{NEWEST}/optimizer/index.json": mutate_json,
        f"{NEWEST}/optimizer/owned-00001-of-00001.safetensors": mutate_safetensors,
    },
    _load_checkpoint,
)
