"""config.json of models that no Hugging Face family has."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from megatron_ext.checkpoint.hf import load_hf_config, load_hf_weights, save_hf
from megatron_ext.checkpoint.hf_config import config_from_hf, config_to_hf
from megatron_ext.checkpoint.own_config import no_family_has
from megatron_ext.errors import CheckpointError
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.model.norm_options import NormOptions

PLAIN = ModelConfig(37, 24, 40, 2, 6, 2, 4, 64, rope_theta=5e5, norm_eps=1e-6)
OWN = replace(PLAIN, norm=NormOptions("ss", "peri", True, True), embedding_projection=True, embedding_gradient_shrink=0.1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"norm": NormOptions("ss")}, "model.norm.kind 'ss'"),
        ({"norm": NormOptions(placement="peri")}, "model.norm.placement 'peri'"),
        ({"norm": NormOptions(depth_scaling=True)}, "model.norm.depth_scaling True"),
        ({"norm": NormOptions(embedding_norm=True)}, "model.norm.embedding_norm True"),
        ({"embedding_projection": True}, "model.embedding_projection"),
        ({"qk_norm": True, "qkv_bias": True}, "model.qk_norm together with model.qkv_bias"),
    ],
)
def test_a_model_without_a_family_says_why_and_comes_back(changes: dict[str, Any], named: str) -> None:
    config = replace(PLAIN, **changes)
    hf = json.loads(json.dumps(config_to_hf(config, dtype="bfloat16", eos_token_id=[3, 4])))
    assert (hf["model_type"], hf["no_family_has"], hf["dtype"], hf["eos_token_id"]) == ("megatron_ext", [named], "bfloat16", [3, 4])
    assert config_from_hf(hf) == config


def test_a_checkpoint_from_before_scaled_positions_is_read() -> None:
    hf = config_to_hf(OWN, dtype="float32")
    assert hf.pop("rope") is not None and config_from_hf(hf) == OWN


def test_a_plain_model_and_one_that_only_trains_differently_stay_in_a_family() -> None:
    assert not no_family_has(PLAIN)
    shrunk = config_to_hf(replace(PLAIN, embedding_gradient_shrink=0.1), dtype="float32")
    assert shrunk == config_to_hf(PLAIN, dtype="float32") and shrunk["model_type"] == "llama"


def test_weights_are_kept_as_they_are_trained(tmp_path: Path) -> None:
    model = GPT(OWN, "dense")
    model.reset_parameters(0)
    save_hf(model.named_parameters(), OWN, tmp_path, 2**30, dtype=torch.float32)
    again = GPT(load_hf_config(tmp_path), "dense")
    load_hf_weights(again, tmp_path)
    assert again.config == OWN
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="megatron_ext"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda hf: hf.pop("hidden_size"), "config.json: hidden_size is missing"),
        (lambda hf: hf.update(moe_experts=3), "config.json: moe_experts is unknown"),
        (lambda hf: hf.update(num_layers=2.5), "config.json: num_layers: 2.5; accepted: int"),
        (lambda hf: hf.update(tie_embeddings=0), "config.json: tie_embeddings: 0; accepted: bool"),
        (lambda hf: hf.update(rope_theta="1e4"), "config.json: rope_theta: '1e4'; accepted: float"),
        (lambda hf: hf.update(norm="ss"), "config.json: norm: 'ss'; accepted: an object with kind, placement"),
        (lambda hf: hf["norm"].update(kind="group"), "config.json: norm: kind: 'group'; accepted: 'rms', 'layer', 'ss'"),
        (lambda hf: hf["norm"].pop("placement"), "config.json: norm: placement is missing"),
        (lambda hf: hf.update(num_kv_heads=4), "config.json describes an impossible model: model.num_kv_heads is 4"),
        (
            lambda hf: hf["rope"].update(factor=-2.0),
            "impossible model: rope.factor: -2.0; accepted: a number above 0",
        ),
        (lambda hf: hf["rope"].update(kind="yarn"), "rope.original_max_position: 0; accepted: at least 1 with kind yarn"),
    ],
)
def test_what_is_not_such_a_model_is_refused_by_name(change: Any, message: str) -> None:
    hf = config_to_hf(OWN, dtype="float32")
    assert config_from_hf(hf) == OWN
    change(hf)
    with pytest.raises(CheckpointError, match=message):
        config_from_hf(hf)
