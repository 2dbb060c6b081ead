"""YaRN's attention factor wherever queries and keys are looked at: gradients, largest logits, sinks."""

from dataclasses import replace

import torch
from torch import Tensor

from megatron_ext.model.attention import Attention
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.model.max_logits import MaxLogits
from megatron_ext.model.probes import watched
from megatron_ext.model.rope import apply_rope, rope_tables
from megatron_ext.model.rope_scaling import RopeScaling, rope_frequencies

YARN = RopeScaling("yarn", 4.0, 8, attention_factor=1.3)
CONFIG = ModelConfig(32, 16, 24, 1, 4, 2, 4, 64, rope=YARN, init_std=0.4)
LENGTH = 20


def scores(attention: Attention, x: Tensor, config: ModelConfig) -> Tensor:
    """[H, T, T] of one document, by complex numbers."""
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope, torch.float64)
    angle = torch.arange(len(x))[:, None, None] * frequencies

    def turned(linear: torch.nn.Module) -> Tensor:
        first, second = linear(x).unflatten(-1, (-1, config.head_dim)).chunk(2, -1)
        return torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)

    q, k = turned(attention.q_proj), turned(attention.k_proj).repeat_interleave(config.num_heads // config.num_kv_heads, 1)
    products = torch.einsum("qhd,khd->hqk", q, k.conj()).real * config.head_dim**-0.5 * config.rope.attention_factor**2
    return products.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), float("-inf"))


def test_gradient_of_the_scaled_rotation() -> None:
    x = torch.randn(5, 1, 8, dtype=torch.float64, requires_grad=True)
    tables = rope_tables(torch.arange(5), 8, 10.0, torch.float64, YARN)
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, *tables), x)
    torch.testing.assert_close(apply_rope(x, *tables).norm(dim=-1), 1.3 * x.norm(dim=-1), rtol=1e-12, atol=0)


def test_largest_logits_and_sinks_are_those_of_the_scaled_scores() -> None:
    def seen(config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
        """Largest logits, those of the probes and the sum of the sinks; checked against the definition."""
        collector = MaxLogits(config)
        model = GPT(config, "dense", max_logits=collector).double()
        model.reset_parameters(0)
        tokens, ends = torch.arange(LENGTH) % config.vocab_size, torch.tensor([0, LENGTH], dtype=torch.int32)
        labels, weight = torch.zeros(LENGTH, dtype=torch.int64), torch.ones(LENGTH)
        with watched(model, ["input_layernorm", "post_attention_layernorm"]) as (tables, logits):
            model(tokens, torch.arange(LENGTH), ends, LENGTH, labels, weight)[0].backward()
        block = model.model.layers["0"]
        with torch.no_grad():
            expected = scores(block.self_attn, block.input_layernorm(model.embed(tokens)), config)
        torch.testing.assert_close(logits.values[0], expected.amax((1, 2)), rtol=1e-10, atol=0)
        torch.testing.assert_close(tables["sink"][0], expected.softmax(-1)[:, 1:, 0].sum(1), rtol=1e-10, atol=0)
        return collector.values, logits.values, tables["sink"].clone()

    for scaled, plain in zip(seen(CONFIG), seen(replace(CONFIG, rope=RopeScaling())), strict=True):
        assert bool(((scaled - plain).abs() > 1e-3).all()), "scaling is seen"
