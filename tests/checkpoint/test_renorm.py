"""Converted models against the models that they are made of."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint.fold import Read
from megatron_ext.checkpoint.hf import in_order
from megatron_ext.checkpoint.own_config import no_family_has
from megatron_ext.checkpoint.renorm import layer_to_rms, rms_to_crms
from megatron_ext.errors import CheckpointError
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.model.norm_options import NormOptions

LAYER = ModelConfig(61, 48, 80, 3, 6, 2, 8, 64, norm_eps=1e-3, init_std=0.1, norm=NormOptions("layer"))
TOKENS, BOUNDARIES = torch.arange(40) * 7 % 61, torch.tensor([0, 40], dtype=torch.int32)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "biases": {"qkv_bias": True, "qk_norm": True, "mlp_bias": True, "head_bias": True},
    "around": {"norm": NormOptions("layer", "pre", True, True), "embedding_projection": True, "tie_embeddings": True},
}


def trained(config: ModelConfig) -> GPT:
    """A float64 model none of whose parameters is where it started."""
    model = GPT(config, "dense").double()
    model.reset_parameters(0)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def built(read: Read, config: ModelConfig) -> GPT:
    model = GPT(config, "dense").double()
    model.load_state_dict(dict(in_order(read, config)))
    return model


def results(model: GPT) -> torch.Tensor:
    """Logits, and losses of the tokens, which take another way through the head."""
    logits = model.logits(TOKENS, torch.arange(40), BOUNDARIES, 40)
    _, losses = model(TOKENS, torch.arange(40), BOUNDARIES, 40, TOKENS.roll(1), torch.ones(40))
    return torch.cat([logits.flatten(), losses]).detach()


def distance(one: GPT, other: GPT) -> float:
    expected = results(other)
    return float((results(one) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_layer_rms_and_crms_are_one_function(case: str) -> None:
    model = trained(replace(LAYER, **CASES[case]))
    read, config = layer_to_rms(model.get_parameter, model.config)
    rms = built(read, config)
    assert config.norm.kind == "rms" and config.mlp_bias and config.head_bias
    assert distance(rms, model) < 1e-10
    crms = built(*rms_to_crms(rms.get_parameter, config))
    assert (crms.config.norm.kind, crms.config.hidden_size) == ("crms", 47)
    assert distance(crms, model) < 1e-10


def test_biases_of_zero_are_left_out_so_that_a_family_has_the_model() -> None:
    model = trained(LAYER)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.bias"):
            parameter.data.zero_()
    read, config = layer_to_rms(model.get_parameter, model.config)
    assert not no_family_has(config)
    assert distance(built(read, config), model) < 1e-10


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.self_attn.o_proj.weight", "model.layers.2.mlp.down_proj.weight"]
)
def test_a_matrix_that_is_not_centred_is_seen(name: str) -> None:
    model = trained(LAYER)
    read, config = layer_to_rms(model.get_parameter, model.config)
    left = {name: model.get_parameter(name)}
    assert distance(built(lambda other: left[other] if other in left else read(other), config), model) > 1e-4
    with pytest.raises(CheckpointError, match=rf"{name} writes vectors of mean .* to the residual stream; accepted is 0"):
        rms_to_crms(lambda other: left[other] if other in left else read(other), config)


def test_a_bias_that_is_forgotten_is_seen() -> None:
    model = trained(LAYER)
    rms = built(*layer_to_rms(model.get_parameter, model.config))
    for name in ("lm_head.bias", "model.layers.0.mlp.up_proj.bias", "model.layers.2.self_attn.v_proj.bias"):
        kept = rms.get_parameter(name).detach().clone()
        rms.get_parameter(name).data.zero_()
        assert distance(rms, model) > 1e-4
        rms.get_parameter(name).data.copy_(kept)


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (NormOptions("rms"), "model.norm.kind 'rms' with placement 'pre'; accepted here: 'layer' with placement 'pre'"),
        (NormOptions("layer", "peri"), "model.norm.kind 'layer' with placement 'peri'; accepted here"),
        (NormOptions("layer", "mix"), "placement 'mix'; accepted here"),
    ],
)
def test_other_models_are_refused(norm: NormOptions, message: str) -> None:
    config = replace(LAYER, norm=norm)
    with pytest.raises(CheckpointError, match=message):
        layer_to_rms(trained(config).get_parameter, config)
    with pytest.raises(CheckpointError, match="model.norm.kind 'ss' with placement 'pre'; accepted here: 'rms'"):
        rms_to_crms(trained(LAYER).get_parameter, replace(config, norm=NormOptions("ss")))
