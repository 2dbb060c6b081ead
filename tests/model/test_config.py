"""Resolving options, counting parameters and operations."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_ext.errors import ConfigError
from megatron_ext.model.block import SITES
from megatron_ext.model.config import ModelConfig, mean_causal_context
from megatron_ext.model.gpt import GPT
from megatron_ext.model.norm_kinds import KINDS
from megatron_ext.model.norm_options import NormOptions
from megatron_ext.model.options import ModelOptions

CONFIG = ModelConfig(
    vocab_size=50, hidden_size=24, intermediate_size=40, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, max_position=64
)


def test_options_left_open_are_resolved() -> None:
    options = ModelOptions(hidden_size=64, num_heads=4)
    config = ModelConfig.from_options(options, vocab_size=100, sequence_length=512)
    assert (config.vocab_size, config.num_kv_heads, config.head_dim, config.max_position) == (100, 4, 16, 512)
    options = ModelOptions(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=8, max_position=99, vocab_size=128, qk_norm=True)
    config = ModelConfig.from_options(options, vocab_size=100, sequence_length=512)
    assert (config.vocab_size, config.num_kv_heads, config.head_dim, config.max_position) == (128, 2, 8, 99)
    assert config.qk_norm
    assert not config.qkv_bias


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_heads": 0}, r"model.num_heads is 0"),
        ({"num_kv_heads": 3}, r"model.num_kv_heads is 3; it must divide model.num_heads \(4\)"),
        ({"head_dim": 7}, r"model.head_dim is 7"),
        ({"num_layers": 0}, r"model.num_layers is 0"),
        ({"num_layers": 65535}, r"model.num_layers is 65535; it must be at least 1 and at most 1000"),
        ({"rope_theta": 0.0}, r"model.rope_theta is 0.0"),
        ({"norm_eps": float("nan")}, r"model.norm_eps is nan"),
        ({"init_std": -1.0}, r"model.init_std is -1.0"),
        ({"head_bias": True, "tie_embeddings": True}, r"model.head_bias is true; accepted is false with model.tie_embeddings"),
        ({"embedding_gradient_shrink": 0.0}, r"model.embedding_gradient_shrink is 0.0; it must be above 0 and at most 1"),
    ],
)
def test_impossible_shapes_are_refused_with_the_key(keys: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **keys)


@pytest.mark.parametrize(
    "keys",
    [
        *({}, {"tie_embeddings": True}, {"qk_norm": True}, {"qkv_bias": True}, {"head_dim": 10}, {"embedding_projection": True}),
        *({"norm": NormOptions(kind, placement, embedding_norm=placement == "peri")} for kind in KINDS for placement in SITES),
        {"norm": NormOptions("layer", "mix", depth_scaling=True)},
        {"mlp_bias": True, "head_bias": True},
    ],
)
def test_parameters_are_counted_as_they_are(keys: dict[str, Any]) -> None:
    config = replace(CONFIG, **keys)
    with torch.device("meta"):
        model = GPT(config)
    assert config.num_parameters() == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("projects", [False, True])
def test_operations_are_those_that_pytorch_counts(projects: bool) -> None:
    """PyTorch counts the whole score matrix; with a mean context of all tokens so do we."""
    tokens, config = 32, replace(CONFIG, embedding_projection=projects)
    model = GPT(config, attention="dense")
    with FlopCounterMode(display=False) as counter:
        model.logits(torch.arange(tokens), torch.arange(tokens), torch.tensor([0, tokens], dtype=torch.int32), tokens).sum().backward()
    # It also counts the sum over tokens, a product with one row, in the gradient of each norm's weight.
    norms = (2 * CONFIG.num_layers + 1) * 2 * tokens * CONFIG.hidden_size
    assert counter.get_total_flops() == config.flops_per_token(tokens) * tokens + norms


def test_epsilon_left_open_depends_on_the_kind_of_norm() -> None:
    def resolved(**options: Any) -> float:
        return ModelConfig.from_options(ModelOptions(**options), 100, 512).norm_eps

    kinds = {kind: resolved(norm=NormOptions(kind)) for kind in KINDS}
    assert kinds == dict.fromkeys(KINDS, 1e-5) | {"ss": 1e-6}
    assert resolved(norm=NormOptions("ss"), norm_eps=1e-3) == 1e-3


@pytest.mark.parametrize("keys", [{"embedding_gradient_shrink": 0.0}, {"embedding_gradient_shrink": 1.5}, {"norm_eps": 0.0}])
def test_options_out_of_range_are_refused(keys: dict[str, float]) -> None:
    ((name, value),) = keys.items()
    with pytest.raises(ConfigError, match=f"{name}: {value}; accepted: "):
        ModelOptions(**keys)


def test_mean_causal_context() -> None:
    assert mean_causal_context([1]) == 1.0
    assert mean_causal_context([3, 1]) == (1 + 2 + 3 + 1) / 4
    assert mean_causal_context([]) == 0.0
