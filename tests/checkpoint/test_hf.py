"""Hugging Face import and export, against transformers itself."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_ext.checkpoint.hf import load_hf_config, load_hf_weights, read_hf_tensors, save_hf, shard_plan
from megatron_ext.checkpoint.hf_config import config_from_hf, config_to_hf
from megatron_ext.errors import CheckpointError
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, lambda **keys: LlamaConfig(**SHAPE | keys)),
    "mistral": (MistralForCausalLM, lambda **keys: MistralConfig(**SHAPE | {"sliding_window": None} | keys)),
    "qwen2": (Qwen2ForCausalLM, lambda **keys: Qwen2Config(**SHAPE | keys)),
    "qwen3": (Qwen3ForCausalLM, lambda **keys: Qwen3Config(**SHAPE | {"head_dim": 12} | keys)),
}
CASES = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 6, "rope_theta": 500000.0}),
    ("llama", {"head_dim": 10}),
    ("mistral", {"head_dim": 16}),
    ("mistral", {"sliding_window": 64}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    ("qwen3", {}),
    ("qwen3", {"tie_word_embeddings": True}),
]


def transformers_model(family: str, keys: Mapping[str, Any]) -> PreTrainedModel:
    """A random model whose norms and biases are random too, so that none of them can be left out unseen."""
    torch.manual_seed(0)
    kind, config = FAMILIES[family]
    model = kind(config(**keys)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def our_logits(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    cu_seqlens = torch.tensor([0, len(tokens)], dtype=torch.int32)
    with torch.no_grad():
        return model.logits(tokens, torch.arange(len(tokens)), cu_seqlens, len(tokens))


def load(directory: Path) -> GPT:
    model = GPT(load_hf_config(directory), attention="sdpa")
    moves: list[int] = []
    load_hf_weights(model, directory, lambda: moves.append(1))
    assert len(moves) == len(list(model.parameters())), "each tensor is told of"
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (50,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A directory with a small Llama."""
    transformers_model("llama", {}).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def edit_config(directory: Path, **keys: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize(("family", "keys"), CASES)
def test_logits_equal_transformers_both_ways(family: str, keys: dict[str, Any], shard: str, tmp_path: Path, tokens: torch.Tensor) -> None:
    theirs = transformers_model(family, keys)
    theirs.save_pretrained(tmp_path / "in", max_shard_size=shard)
    ours = load(tmp_path / "in")
    expected = theirs(tokens[None]).logits[0]
    assert (our_logits(ours, tokens) - expected).abs().max() < 1e-5

    limit = 20_000 if shard == "20KB" else 2**30
    save_hf(ours.named_parameters(), ours.config, tmp_path / "out", limit, dtype=torch.float32, bos_token_id=1, eos_token_id=2)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shard == "20KB")
    back, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert back.dtype == torch.float32
    assert back.config.eos_token_id == 2
    assert (back(tokens[None]).logits[0] - expected).abs().max() < 1e-5
    for name, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


def test_a_wrong_norm_epsilon_would_be_seen(llama: Path, tokens: torch.Tensor) -> None:
    expected = our_logits(load(llama), tokens)
    edit_config(llama, rms_norm_eps=1e-3)
    assert (our_logits(load(llama), tokens) - expected).abs().max() > 1e-3


def test_bfloat16_agrees_with_transformers_within_its_rounding(tmp_path: Path, tokens: torch.Tensor) -> None:
    theirs = transformers_model("qwen3", {}).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours = GPT(load_hf_config(tmp_path), attention="sdpa").to(torch.bfloat16)
    load_hf_weights(ours, tmp_path)
    expected = theirs(tokens[None]).logits[0]
    exact = theirs.float()(tokens[None]).logits[0]
    spread = (expected - exact).abs().max()
    assert (our_logits(ours, tokens) - exact).abs().max() < 1.5 * spread


@pytest.mark.parametrize(("family", "keys"), CASES)
def test_config_survives_the_round_trip(family: str, keys: dict[str, Any]) -> None:
    config = config_from_hf(FAMILIES[family][1](**keys).to_dict())
    assert config_from_hf(config_to_hf(config, dtype="float32")) == config


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_keys_left_out_mean_what_transformers_means(family: str, tmp_path: Path) -> None:
    needed = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 32}
    hf = {"model_type": family, **needed}
    if family == "mistral":
        hf["sliding_window"] = None
    (tmp_path / "config.json").write_text(json.dumps(hf))
    theirs = AutoConfig.from_pretrained(tmp_path)
    ours = config_from_hf(hf)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 64 // 32)
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.init_std == theirs.initializer_range


def test_rotary_base_of_the_older_layout() -> None:
    hf = {"model_type": "llama", **SHAPE, "rope_theta": 1234.0, "rope_scaling": None}
    assert config_from_hf(hf).rope_theta == 1234.0
    with pytest.raises(CheckpointError, match=r"rope_theta is given as 99.0 and as 1234.0"):
        config_from_hf(hf | {"rope_parameters": {"rope_type": "default", "rope_theta": 99.0}})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral'; accepted are llama, mistral, qwen2, qwen3 and megatron_ext"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": "mistral", "sliding_window": 32}, "sliding_window is 32, below max_position_embeddings"),
        ({"model_type": "mistral", "max_position_embeddings": 32768}, "sliding_window is 4096"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32}, "use_sliding_window is true; only false is supported"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention, which is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size is None; a number is needed"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None; a number is needed"),
        ({"num_key_value_heads": 4}, "num_kv_heads is 4; it must divide"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(keys: dict[str, Any], message: str) -> None:
    config_from_hf({"model_type": "llama", **SHAPE})
    with pytest.raises(CheckpointError, match=message):
        config_from_hf({"model_type": "llama", **SHAPE, **keys})


def change_tensors(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "missing: model.norm.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "does not have: extra"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(7)}), r"model.norm.weight has shape \[7\]; config.json asks for \[48\]"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)}), "model.norm.weight has dtype I8"),
    ],
)
def test_wrong_tensors_are_refused_before_anything_changes(llama: Path, change: Any, message: str) -> None:
    change_tensors(llama, change)
    model = GPT(load_hf_config(llama))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_hf_weights(model, llama)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tables_of_old_checkpoints_are_ignored(llama: Path, tokens: torch.Tensor) -> None:
    expected = our_logits(load(llama), tokens)
    change_tensors(llama, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    assert torch.equal(our_logits(load(llama), tokens), expected)


def test_a_tied_model_may_carry_its_head_only_as_a_copy(tmp_path: Path) -> None:
    transformers_model("llama", {"tie_word_embeddings": True}).save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load(tmp_path)
    change_tensors(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs"):
        load(tmp_path)


def test_a_cut_file_is_refused_by_name(llama: Path) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors is no whole safetensors file"):
        load(llama)


def test_pickles_are_refused_with_the_way_out(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle.*save_pretrained"):
        load(llama)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", 7])
def test_an_index_cannot_point_outside(llama: Path, file: Any) -> None:
    (llama.parent / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    with pytest.raises(CheckpointError, match=r"only .safetensors files of the same directory"):
        load(llama)


def test_an_index_that_is_wrong_is_refused(llama: Path) -> None:
    index = llama / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"nothing": "model.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"places nothing in model.safetensors"):
        load(llama)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "absent.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"absent.safetensors does not exist"):
        load(llama)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        load(llama)


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json does not exist"):
        load(tmp_path)


def test_saving_wrong_tensors_is_refused_and_leaves_no_config(tmp_path: Path) -> None:
    model = GPT(ModelConfig(32, 8, 16, 1, 2, 1, 4, 16))
    tensors = dict(model.named_parameters())
    for wrong, message in (
        ({**tensors, "extra": torch.zeros(1)}, "tensor extra is not part"),
        ({**tensors, "model.norm.weight": torch.zeros(3)}, r"model.norm.weight has shape \[3\]"),
        ({name: value for name, value in tensors.items() if name != "model.norm.weight"}, "missing: model.norm.weight"),
    ):
        with pytest.raises(CheckpointError, match=message):
            save_hf(wrong.items(), model.config, tmp_path / "out", 2**30, dtype=torch.float32)
        assert not (tmp_path / "out" / "config.json").exists()


def test_order_of_the_tensors_does_not_matter(tmp_path: Path) -> None:
    model = GPT(ModelConfig(32, 8, 16, 2, 2, 1, 4, 16))
    names = list(dict(model.named_parameters()))
    save_hf(reversed(list(model.named_parameters())), model.config, tmp_path, 1000, dtype=torch.float32)
    stored = list(read_hf_tensors(tmp_path, model.config))
    assert [name for name, _ in stored] == names
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in stored)


def test_shard_plan_keeps_order_and_size() -> None:
    assert shard_plan({"a": 3, "b": 3, "c": 5, "d": 9, "e": 1}, 6) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert shard_plan({"a": 3, "b": 3}, 6) == [["a", "b"]]
    assert shard_plan({}, 6) == []
