"""Places of norms against blocks written by hand and against Gemma 2 of transformers; scaling by depth."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer, Gemma2RotaryEmbedding

from megatron_ext.model.block import Block, placement_of
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.model.init import initialize_parameter
from megatron_ext.model.norm_options import NormOptions
from megatron_ext.parallel.pipeline import stages
from megatron_ext.parallel.tensor import single

CONFIG = ModelConfig(37, 24, 40, 5, 6, 2, 4, 64, init_std=0.3)
TOKENS = torch.arange(12) * 5 % 37
BOUNDARIES = torch.tensor([0, 12], dtype=torch.int32)
Hand = Callable[[Tensor, dict[str, Tensor], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]], Tensor]


def perturbed(module: torch.nn.Module) -> torch.nn.Module:
    """In float64, norms and biases away from where they start."""
    generator = torch.Generator().manual_seed(5)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def gpt(config: ModelConfig) -> GPT:
    model = GPT(config, "dense")
    model.reset_parameters(0)
    return perturbed(model)


def pre(x: Tensor, norm: dict[str, Callable[[Tensor], Tensor]], attention: Callable, mlp: Callable) -> Tensor:
    x = x + attention(norm["input_layernorm"](x))
    return x + mlp(norm["post_attention_layernorm"](x))


def post(x: Tensor, norm: dict[str, Callable[[Tensor], Tensor]], attention: Callable, mlp: Callable) -> Tensor:
    x = norm["post_attention_layernorm"](x + attention(x))
    return norm["post_feedforward_layernorm"](x + mlp(x))


def peri(x: Tensor, norm: dict[str, Callable[[Tensor], Tensor]], attention: Callable, mlp: Callable) -> Tensor:
    x = x + norm["post_attention_layernorm"](attention(norm["input_layernorm"](x)))
    return x + norm["post_feedforward_layernorm"](mlp(norm["pre_feedforward_layernorm"](x)))


def by_pytorch(kind: str, block: Block, name: str) -> Callable[[Tensor], Tensor]:
    """A norm of a block in terms of PyTorch's functions."""
    module = block.get_submodule(name)
    if kind == "layer":
        return lambda x: F.layer_norm(x, (24,), module.weight, module.bias, 1e-5)
    return lambda x: F.rms_norm(x, (24,), None, 1e-5) * module.weight


@pytest.mark.parametrize("kind", ["rms", "layer", "ss"])
@pytest.mark.parametrize(
    ("placement", "by_layer"), [("pre", [pre] * 5), ("post", [post] * 5), ("peri", [peri] * 5), ("mix", [post] * 2 + [pre] * 3)]
)
def test_blocks_equal_those_written_by_hand(kind: str, placement: str, by_layer: list[Hand]) -> None:
    model = gpt(replace(CONFIG, norm=NormOptions(kind, placement)))
    pack = model.context(torch.arange(12), BOUNDARIES, 12)
    x = torch.randn(12, 24, dtype=torch.float64)
    for hand, block in zip(by_layer, model.model.layers.values(), strict=True):
        norms = {name: by_pytorch(kind, block, name) for name, _ in block.named_children() if "norm" in name}
        expected = hand(x, norms, lambda y, block=block: block.self_attn(y, pack), lambda y, block=block: block.mlp(y, 12))
        x = block(x, pack)
        assert (x - expected).norm() < 1e-14 * expected.norm()


def test_peri_is_the_block_of_gemma_2() -> None:
    """Gemma's gains are kept as their distance from 1."""
    shape = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4}
    same = {"hidden_activation": "silu", "rms_norm_eps": 1e-5, "query_pre_attn_scalar": 4, "attn_logit_softcapping": None}
    theirs = Gemma2Config(**shape, **same, num_hidden_layers=1, layer_types=["full_attention"], attn_implementation="eager")
    layer = Gemma2DecoderLayer(theirs, 0).eval()
    config = replace(CONFIG, norm=NormOptions("rms", "peri"))
    model = gpt(config).float()
    block = model.model.layers["0"]
    layer.load_state_dict({name: p - 1 if "layernorm" in name else p for name, p in block.state_dict().items()})
    x = torch.randn(1, 12, 24)
    angles = Gemma2RotaryEmbedding(theirs)(x, torch.arange(12)[None])
    mask = torch.full((12, 12), float("-inf")).triu(1)[None, None]
    expected = layer(x, position_embeddings=angles, attention_mask=mask)
    expected = expected[0] if isinstance(expected, tuple) else expected
    found = block(x[0], model.context(torch.arange(12), BOUNDARIES, 12))
    torch.testing.assert_close(found, expected.view(12, 24), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("layers", "first"), [(1, 1), (4, 1), (5, 2), (12, 3)])
def test_mix_is_post_in_the_first_quarter(layers: int, first: int) -> None:
    config = replace(CONFIG, num_layers=layers, norm=NormOptions("rms", "mix"))
    assert [placement_of(config, layer) for layer in range(layers)] == ["post"] * first + ["pre"] * (layers - first)


@pytest.mark.parametrize("kind", ["rms", "layer", "ss", "crms"])
def test_depth_scaling_is_a_factor_of_the_gains(kind: str) -> None:
    scaled = gpt(replace(CONFIG, norm=NormOptions(kind, depth_scaling=True)))
    plain = gpt(replace(CONFIG, norm=NormOptions(kind)))
    weights = scaled.state_dict()
    for layer in range(5):
        for name in weights:
            if name.startswith(f"model.layers.{layer}.") and "layernorm" in name:
                weights[name] = weights[name] / math.sqrt(layer + 1)
    assert distance(scaled, plain) > 1e-3
    plain.load_state_dict(weights)
    assert distance(scaled, plain) < 1e-13


def distance(one: GPT, other: GPT) -> float:
    found, expected = (model.logits(TOKENS, torch.arange(12), BOUNDARIES, 12) for model in (one, other))
    return float(((found - expected).norm() / expected.norm()).detach())


def test_depth_scaling_counts_layers_of_the_whole_model_on_stages_from_the_meta_device() -> None:
    config = replace(CONFIG, norm=NormOptions("ss", depth_scaling=True))
    parts = []
    for stage in stages([2, 3]):
        with torch.device("meta"):
            parts.append(GPT(config, "dense", stage=stage))
        parts[-1].to_empty(device="cpu").reset_parameters(0)
    whole = GPT(config, "dense")
    whole.reset_parameters(0)
    pack = whole.context(torch.arange(12), BOUNDARIES, 12)
    x = parts[1].blocks(parts[0].blocks(parts[0].embed(TOKENS), pack), pack)
    assert torch.equal(parts[1].head_input(x, 12), whole.head_input(whole.blocks(whole.embed(TOKENS), pack), 12))
    factors = [block.input_layernorm.factor for part in parts for block in part.model.layers.values()]
    assert factors == [1 / math.sqrt(number) for number in range(1, 6)]


def test_depth_scaling_switches_the_scaled_initialization_off() -> None:
    plain, scaled = (torch.empty(200, 100) for _ in range(2))
    for weight, options in ((plain, NormOptions()), (scaled, NormOptions(depth_scaling=True))):
        initialize_parameter("model.layers.0.mlp.down_proj.weight", weight, replace(CONFIG, norm=options), seed=1)
    torch.testing.assert_close(plain * math.sqrt(10), scaled)
    assert scaled.std().item() == pytest.approx(0.3, rel=0.02)


def test_norms_outside_blocks_are_not_scaled() -> None:
    model = GPT(replace(CONFIG, norm=NormOptions("rms", depth_scaling=True, embedding_norm=True)))
    assert model.model.norm.factor == model.model.embed_norm.factor == 1.0


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("placement", ["post", "peri", "mix"])
def test_recomputation_changes_no_number(placement: str, recompute: str) -> None:
    gradients = []
    for what in ("none", recompute):
        model = GPT(replace(CONFIG, norm=NormOptions("layer", placement, depth_scaling=True)), "dense", what)
        model.reset_parameters(0)
        loss, _ = model(TOKENS, torch.arange(12), BOUNDARIES, 12, TOKENS, torch.ones(12))
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_block_without_any_option_has_the_names_of_llama() -> None:
    names = [name for name, _ in Block(CONFIG, "dense", single(), 0).named_parameters() if "norm" in name]
    assert names == ["input_layernorm.weight", "post_attention_layernorm.weight"]
