"""Initial weights depend on the seed and the parameter's name, and on nothing else."""

import math
from dataclasses import replace

import torch

from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.model.init import initialize_parameter

CONFIG = ModelConfig(300, 64, 96, 4, 4, 2, 16, 64, qk_norm=True, qkv_bias=True)


def weights(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = GPT(config).to(dtype)
    model.to_empty(device="cpu")
    model.reset_parameters(seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_every_value_is_drawn_on_a_model_from_the_meta_device() -> None:
    drawn = weights(CONFIG, seed=1)
    for name, value in drawn.items():
        if name.endswith("norm.weight"):
            assert (value == 1).all(), name
        elif name.endswith("bias"):
            assert (value == 0).all(), name
        else:
            scale = math.sqrt(8) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            assert abs(value.std().item() * scale / CONFIG.init_std - 1) < 0.05, name
            assert abs(value.mean().item()) < 0.002, name


def test_a_function_of_seed_and_name_alone() -> None:
    drawn = weights(CONFIG, seed=1)
    other_seed = weights(CONFIG, seed=2)
    deeper = weights(replace(CONFIG, num_layers=4, tie_embeddings=True, qkv_bias=False), seed=1)
    for name, value in drawn.items():
        if value.std() > 0:
            assert not torch.equal(value, other_seed[name]), name
        if name in deeper:
            assert torch.equal(value, deeper[name]), name
    alone = torch.empty(32, 64)
    initialize_parameter("model.layers.3.self_attn.k_proj.weight", alone, CONFIG, seed=1)
    assert torch.equal(alone, drawn["model.layers.3.self_attn.k_proj.weight"])
    first, second = (drawn[f"model.layers.{layer}.self_attn.k_proj.weight"] for layer in (0, 1))
    assert not torch.equal(first, second)


def test_the_dtype_only_rounds() -> None:
    exact, rounded = weights(CONFIG, seed=1), weights(CONFIG, seed=1, dtype=torch.bfloat16)
    assert all(torch.equal(value.bfloat16(), rounded[name]) for name, value in exact.items())
