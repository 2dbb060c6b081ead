"""Rotated and folded models compute what they computed before, for every family; and only because everything was turned."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.hadamard import hadamard_matrix
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.model.norm_options import NormOptions
from megatron_ext.model.rotation import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    Weights,
    fold_norms,
    hadamard_block,
    orthonormal_hadamard,
    rotate_down_weights,
    rotate_heads,
    rotate_residual,
)

SHAPE = ModelConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=8, max_position=64
)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama with grouped queries": {},
    "llama, tied": {"tie_embeddings": True},
    "qwen2 with biases": {"qkv_bias": True, "tie_embeddings": True},
    "qwen3 with norms of queries and keys": {"qk_norm": True, "head_dim": 12, "num_kv_heads": 6},
    "sizes without a Hadamard matrix": {"hidden_size": 44, "intermediate_size": 52, "head_dim": 10},
}
EXACT = 1e-12


@pytest.fixture(params=list(FAMILIES.values()), ids=list(FAMILIES))
def model(request: pytest.FixtureRequest) -> GPT:
    return random_model(replace(SHAPE, **request.param))


def random_model(config: ModelConfig) -> GPT:
    """float64, with random gains and biases and weights so large that everything matters."""
    generator = torch.Generator().manual_seed(0)
    model = GPT(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            noise *= 0.3 if noise.ndim == 1 else noise.shape[1] ** -0.5
            parameter.copy_(noise + name.endswith("norm.weight"))
    return model


def weights_of(model: GPT) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def logits(weights: Weights, config: ModelConfig, down_block: int | None = None) -> Tensor:
    """Of two documents; with ``down_block`` the inputs of down_proj are turned on the way."""
    model = GPT(config).double().eval()
    model.load_state_dict(weights, strict=True)
    if down_block is not None:
        for layer in model.model.layers.values():
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: (orthonormal_hadamard(args[0], down_block), *args[1:]))
    tokens = torch.randint(0, config.vocab_size, (30,), generator=torch.Generator().manual_seed(1))
    positions = torch.cat((torch.arange(20), torch.arange(10)))
    return model.logits(tokens, positions, torch.tensor([0, 20, 30], dtype=torch.int32), 20)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_folding_keeps_the_logits(model: GPT) -> None:
    weights, expected = weights_of(model), logits(weights_of(model), model.config)
    folded, config = fold_norms(weights, model.config)
    assert not config.tie_embeddings and HEAD in folded
    assert distance(logits(folded, config), expected) < EXACT
    for name, gain in folded.items():
        if name == FINAL_NORM or name.endswith("layernorm.weight"):
            assert torch.equal(gain, torch.ones_like(gain)) and not torch.equal(weights[name], gain)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            assert torch.equal(gain, weights[name])
    assert torch.equal(folded[EMBEDDING], weights[EMBEDDING])
    assert distance(logits({**folded, FINAL_NORM: weights[FINAL_NORM]}, config), expected) > 1e-2, "a gain left behind is seen"


def test_every_turn_keeps_the_logits(model: GPT) -> None:
    expected = logits(weights_of(model), model.config)
    weights, config = fold_norms(weights_of(model), model.config)
    down = hadamard_block(config.intermediate_size)
    residual = rotate_residual(weights, config, seed=3)
    assert distance(logits(residual, config), expected) < EXACT
    heads = rotate_heads(weights, config)
    assert distance(logits(heads, config), expected) < EXACT
    inner = rotate_down_weights(weights, config)
    assert distance(logits(inner, config, down), expected) < EXACT
    assert distance(logits(inner, config), expected) > 1e-2, "without the turn on the way"
    together = rotate_down_weights(rotate_heads(residual, config), config)
    assert distance(logits(together, config, down), expected) < EXACT
    changed = {name for name, weight in together.items() if not torch.equal(weight, weights[name])}
    kept = ("layernorm.weight", "model.norm.weight", "q_norm.weight", "k_norm.weight", "q_proj.bias", "k_proj.bias")
    assert changed == {name for name in weights if not name.endswith(kept)}


def test_turns_without_folding_need_it(model: GPT) -> None:
    heads = rotate_heads(weights_of(model), model.config)
    inner = rotate_down_weights(heads, model.config)
    expected = logits(weights_of(model), model.config)
    assert distance(logits(inner, model.config, hadamard_block(model.config.intermediate_size)), expected) < EXACT


def test_residual_is_not_turned_before_folding(model: GPT) -> None:
    weights, config = weights_of(model), model.config
    with pytest.raises(ConfigError, match=r"norm.weight is not all 1; the residual stream can be turned after fold_norms"):
        rotate_residual(weights, config, seed=3)
    gains = {name: weight for name, weight in weights.items() if name.endswith("layernorm.weight") or name == FINAL_NORM}
    turned = rotate_residual({**weights, **{name: torch.ones_like(gain) for name, gain in gains.items()}}, config, seed=3)
    assert distance(logits({**turned, **gains}, config), logits(weights, config)) > 1e-2, "what the error is about"


def test_a_tied_model_without_gains_can_stay_tied() -> None:
    config = replace(SHAPE, tie_embeddings=True)
    weights = weights_of(random_model(config))
    weights |= {name: torch.ones_like(weight) for name, weight in weights.items() if name.endswith("norm.weight")}
    assert distance(logits(rotate_residual(weights, config, seed=3), config), logits(weights, config)) < EXACT


@pytest.mark.parametrize("left", [EMBEDDING, HEAD, "model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight"])
def test_a_matrix_that_is_not_turned_is_seen(left: str) -> None:
    weights, config = fold_norms(weights_of(random_model(SHAPE)), SHAPE)
    turned = rotate_residual(weights, config, seed=3)
    assert distance(logits({**turned, left: weights[left]}, config), logits(weights, config)) > 1e-2


def test_values_turned_without_o_proj_are_seen() -> None:
    weights = weights_of(random_model(replace(SHAPE, qkv_bias=True)))
    config = replace(SHAPE, qkv_bias=True)
    turned = rotate_heads(weights, config)
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.v_proj.bias"):
        assert distance(logits({**turned, name: weights[name]}, config), logits(weights, config)) > 1e-3


def test_seed_draws_the_signs_and_types_stay() -> None:
    weights, config = fold_norms(weights_of(random_model(SHAPE)), SHAPE)
    half = {name: weight.bfloat16() for name, weight in weights.items()}
    a, b, again = (rotate_residual(half, config, seed) for seed in (1, 2, 1))
    assert not torch.equal(a[EMBEDDING], b[EMBEDDING]) and torch.equal(a[EMBEDDING], again[EMBEDDING])
    assert all(weight.dtype == torch.bfloat16 and weight.is_contiguous() for weight in a.values())
    exact = rotate_residual({name: weight.double() for name, weight in half.items()}, config, 1)
    assert all(torch.equal(weight, exact[name].bfloat16()) for name, weight in a.items()), "rounded once"


@pytest.mark.parametrize(("size", "block"), [(64, 64), (48, 48), (704, 64), (52, 4), (10, 2), (5504, 128), (28, 28), (65536, 32768)])
def test_largest_block(size: int, block: int) -> None:
    assert hadamard_block(size) == block


def test_orthonormal_hadamard_is_the_matrix() -> None:
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    signs = torch.where(torch.arange(96) % 3 == 0, -1.0, 1.0)
    matrix = hadamard_matrix(48).double() / 48**0.5
    expected = ((x * signs).unflatten(1, (2, 48)) @ matrix.mT).flatten(1)
    assert (orthonormal_hadamard(x, 48, signs) - expected).abs().max() < 1e-14
    assert (orthonormal_hadamard(x.float(), 48, signs) - expected).abs().max() < 1e-6
    assert torch.allclose(orthonormal_hadamard(x, 48, signs).norm(dim=1), x.norm(dim=1), rtol=1e-14)


@pytest.mark.parametrize("change", [fold_norms, lambda w, c: rotate_residual(w, c, 0), rotate_heads, rotate_down_weights])
def test_weights_of_another_model_are_refused(change: Callable[[Weights, ModelConfig], object]) -> None:
    weights, config = fold_norms(weights_of(random_model(SHAPE)), SHAPE)
    with pytest.raises(ConfigError, match=r"weights of another model: lm_head.weight is unknown"):
        change(weights, replace(config, tie_embeddings=True))
    with pytest.raises(ConfigError, match=r"weights of another model: model.layers.0.self_attn.k_norm.weight is missing"):
        change(weights, replace(config, qk_norm=True))
    with pytest.raises(ConfigError, match=r"is \[61, 32\]; expected \[62, 32\]"):
        change(weights, replace(config, vocab_size=62))


def test_odd_sizes_are_refused() -> None:
    weights, config = fold_norms(weights_of(random_model(replace(SHAPE, intermediate_size=45))), replace(SHAPE, intermediate_size=45))
    with pytest.raises(ConfigError, match="a dimension of 45 can not be turned by Hadamard matrices; accepted are even numbers"):
        rotate_down_weights(weights, config)


@pytest.mark.parametrize(
    "changes",
    [{"norm": NormOptions("ss")}, {"norm": NormOptions(placement="peri")}, {"norm": NormOptions("layer")}, {"embedding_projection": True}],
)
def test_other_norms_are_refused(changes: dict[str, Any]) -> None:
    config = replace(SHAPE, **changes)
    weights = weights_of(random_model(config))
    for change in (fold_norms, partial(rotate_residual, seed=0)):
        with pytest.raises(ConfigError, match="the residual stream cannot be turned; accepted are RMSNorm before attention and MLP"):
            change(weights, config)
