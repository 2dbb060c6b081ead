"""Forms of a model that compute the same, and quantization that ends when it should."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_ext.errors import CheckpointError, ConfigError
from megatron_ext.model.gpt import GPT
from megatron_ext.precision.integer import quantize_symmetric
from megatron_ext.precision.post_training import named_scheme
from megatron_ext.train.quantized_model import ROTATIONS, block_linears, build_rotated, quantized, read_weights, rotation_blocks
from tests.train.outliers import SHAPE, answered_packs, model_of, random_weights


@torch.no_grad()
def logits(model: GPT) -> Tensor:
    tokens = torch.arange(40)
    return model.logits(tokens, tokens, torch.tensor([0, 40], dtype=torch.int32), 40)


@pytest.mark.parametrize("rotation", [name for name in ROTATIONS if name != "none"])
def test_forms_compute_the_same(rotation: str) -> None:
    weights = random_weights(residual=3.0, down=4.0)
    expected, turned = logits(model_of(weights)), model_of(weights, rotation)
    assert (logits(turned) - expected).abs().max() < 1e-4 * expected.abs().max()
    for linear in block_linears(turned).values():
        linear._forward_pre_hooks.clear()
    assert (logits(turned) - expected).abs().max() > 1e-2 * expected.abs().max(), "the turn on the way is needed"


def test_blocks_that_are_said_are_those_of_the_sizes() -> None:
    assert rotation_blocks(SHAPE, "none") == []
    assert rotation_blocks(SHAPE, "hadamard") == [("down_proj inputs", 128, 128)]
    assert {size for _, size, _ in rotation_blocks(SHAPE, "quarot")} == {128, 64, 16}


def test_linears_are_those_of_blocks_and_no_other() -> None:
    names = list(block_linears(model_of(random_weights())))
    assert names[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    assert len(names) == 7 * SHAPE.num_layers


@pytest.mark.parametrize("only", [None, {"model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"}])
def test_weights_and_inputs_are_quantized_inside_the_block_only(only: set[str] | None) -> None:
    model = model_of(random_weights(), "hadamard")
    before, kept = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    inputs: dict[str, Tensor] = {}
    with quantized(model, named_scheme("W4A4"), only):
        for name, linear in block_linears(model).items():
            linear.register_forward_hook(lambda _, args, out, name=name: inputs.__setitem__(name, args[0]))
        assert not torch.allclose(logits(model), before, rtol=1e-2)
        for name, value in model.state_dict().items():
            touched = name.endswith("_proj.weight") and (only is None or name.removesuffix(".weight") in only)
            assert torch.equal(value, quantize_symmetric(kept[name], 4) if touched else kept[name])
        for name, x in inputs.items():
            levels = max(len(row.unique()) for row in x)
            assert (levels <= 15) == (only is None or name in only), "after the turn, not before"
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), before)


def test_keys_and_values_are_quantized_inside_the_block_only() -> None:
    model = model_of(random_weights())
    before = logits(model)
    with quantized(model, named_scheme("W16A16KV2")):
        rounded = logits(model)
    assert not torch.allclose(rounded, before, rtol=1e-2)
    assert torch.equal(logits(model), before)
    with quantized(model, named_scheme("W16A16KV2"), only=set()):
        assert torch.equal(logits(model), before)


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model = model_of(random_weights())
    before = logits(model)
    with pytest.raises(ZeroDivisionError), quantized(model, named_scheme("W2A2")):
        1 / 0  # noqa: B018
    assert torch.equal(logits(model), before)


def test_weights_alone_and_inputs_alone() -> None:
    model = model_of(random_weights())
    with quantized(model, named_scheme("W4A16")):
        weights_only = logits(model)
        assert not any(linear._forward_pre_hooks for linear in block_linears(model).values())
    kept = block_linears(model)["model.layers.0.mlp.up_proj"].weight.clone()
    with quantized(model, named_scheme("W16A4")):
        assert torch.equal(block_linears(model)["model.layers.0.mlp.up_proj"].weight, kept)
        assert not torch.allclose(logits(model), weights_only, rtol=1e-2)


def test_labels_of_the_model_itself_are_likely() -> None:
    """What the tests of evaluation rely on."""
    model = model_of(random_weights())
    pack = answered_packs(model, 1)[0]
    with torch.no_grad():
        loss = float(model(*pack.model_inputs)[0]) / 64
    assert loss < 1.5 < torch.tensor(64.0).log()


def test_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config.json does not exist; a Hugging Face model directory is needed"):
        read_weights(tmp_path)
    weights = random_weights()
    del weights["lm_head.weight"]
    with pytest.raises(ConfigError, match="lm_head.weight is missing"):
        model_of(weights, "quarot")


def test_bfloat16_computes_the_same_but_for_rounding() -> None:
    model = build_rotated(random_weights(), SHAPE, "quarot", 0, torch.device("cpu"), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    expected = logits(model_of(random_weights()))
    assert (logits(model).float() - expected).norm() < 0.05 * expected.norm()
