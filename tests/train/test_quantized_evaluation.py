"""Losses before and after, what rotation is for, and which linear is named as the worst."""

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.precision.post_training import named_scheme
from megatron_ext.train.quantized_evaluation import UNQUANTIZED, linear_errors, linear_losses, mean_loss, quantized_losses
from megatron_ext.train.quantized_model import block_linears
from tests.train.outliers import CHANNEL, answered_packs, model_of, random_weights

W4A4 = named_scheme("W4A4")


def increases(weights: dict[str, torch.Tensor], rotation: str) -> dict[str, float]:
    packs = answered_packs(model_of(weights), 16)
    schemes = [named_scheme(name) for name in ("W8A8", "W4A4", "W16A4")]
    losses = quantized_losses(model_of(weights, rotation), schemes, packs)
    return {each.scheme: each.increase for each in losses}


def test_mean_loss_is_that_of_the_logits() -> None:
    model = model_of(random_weights())
    packs = answered_packs(model, 3)
    packs[0].loss_weight[10:] = 0.0
    total = 0.0
    for pack in packs:
        with torch.no_grad():
            logits = model.logits(pack.tokens, pack.positions, pack.cu_seqlens, pack.max_seqlen)
        total += float((F.cross_entropy(logits, pack.labels, reduction="none") * pack.loss_weight).sum())
    assert math.isclose(mean_loss(model, packs), total / (10 + 64 + 64), rel_tol=1e-5)


def test_more_bits_cost_less() -> None:
    model = model_of(random_weights())
    losses = quantized_losses(model, [named_scheme(name) for name in ("W8A8", "W4A8", "W4A4", "W3A3")], answered_packs(model))
    assert [each.scheme for each in losses] == [UNQUANTIZED, "W8A8", "W4A8", "W4A4", "W3A3"]
    assert losses[0].increase == 0.0
    assert abs(losses[1].increase) < 0.05 < losses[2].increase < losses[3].increase < losses[4].increase
    assert all(math.isclose(each.loss - losses[0].loss, each.increase) for each in losses)


def test_turning_the_residual_stream_lowers_the_cost_of_its_outlier() -> None:
    weights = random_weights(residual=15.0)
    before, after = increases(weights, "none"), increases(weights, "quarot")
    assert before["W4A4"] > 3.0
    assert after["W4A4"] < 0.5 * before["W4A4"]
    assert increases(weights, "hadamard")["W4A4"] > 0.9 * before["W4A4"], "the turn before down_proj does not reach it"
    assert abs(after["W8A8"]) < 0.05


def test_turning_the_inputs_of_down_proj_lowers_the_cost_of_their_outlier() -> None:
    """Of activations above all: the planted channel makes the weights of down_proj uneven, too, which the turn spreads over all of them."""
    weights = random_weights(down=30.0)
    before, after = increases(weights, "none"), increases(weights, "hadamard")
    assert after["W16A4"] < 0.5 * before["W16A4"]
    assert after["W4A4"] < 0.85 * before["W4A4"]


def test_linear_errors_are_those_of_the_definition() -> None:
    model = model_of(random_weights(), "hadamard")
    packs = answered_packs(model, 2)
    name = "model.layers.1.mlp.down_proj"
    linear = block_linears(model)[name]
    seen: list[torch.Tensor] = []
    hook = linear.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    mean_loss(model, packs)
    hook.remove()
    x = torch.cat(seen)
    error = next(each for each in linear_errors(model, W4A4, packs) if each.name == name)
    kept = linear.weight.detach()
    weight, rounded_x = W4A4.weight(kept), W4A4.activation(x)
    assert math.isclose(error.weight, (weight - kept).norm() / kept.norm(), rel_tol=1e-4)
    assert math.isclose(error.input, (rounded_x - x).norm() / x.norm(), rel_tol=1e-4)
    exact = x @ kept.mT
    assert math.isclose(error.output, (rounded_x @ weight.mT - exact).norm() / exact.norm(), rel_tol=1e-4)
    assert not any(linear._forward_hooks for linear in block_linears(model).values())


@pytest.mark.parametrize("layer", [0, 1])
def test_the_linear_with_an_outlier_is_the_worst(layer: int) -> None:
    weights = random_weights()
    weights[f"model.layers.{layer}.mlp.up_proj.weight"][CHANNEL] *= 300
    weights[f"model.layers.{layer}.mlp.down_proj.weight"][:, CHANNEL] /= 300
    model = model_of(weights)
    packs = answered_packs(model)
    worst = f"model.layers.{layer}.mlp.down_proj"
    errors = linear_errors(model, W4A4, packs)
    assert len(errors) == 14 and errors[0].name == worst
    assert [each.output for each in errors] == sorted((each.output for each in errors), reverse=True)
    before = mean_loss(model, packs)
    losses = linear_losses(model, W4A4, packs, before)
    assert len(losses) == 14 and losses[0].name == worst
    assert math.isclose(losses[0].increase, losses[0].loss - before)
    assert mean_loss(model, packs) == before
    weights_only = linear_errors(model, named_scheme("W4A16"), packs)
    assert all(each.input == 0.0 < each.weight for each in weights_only)
