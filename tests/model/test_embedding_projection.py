"""Projections of embeddings, their first values, and gradients of embeddings made smaller."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.model.config import ModelConfig
from megatron_ext.model.embedding_projection import EmbeddingProjection, shrink_gradient
from megatron_ext.model.gpt import GPT
from megatron_ext.model.init import initialize_parameter
from megatron_ext.model.norm_options import NormOptions
from megatron_ext.parallel.pipeline import stages

CONFIG = ModelConfig(37, 24, 40, 2, 6, 2, 4, 64, embedding_projection=True, init_std=0.3)
TOKENS, BOUNDARIES = torch.arange(12) * 5 % 37, torch.tensor([0, 12], dtype=torch.int32)
NAMES = ("model.embed_projection.weight", "model.head_projection.weight")


def gpt(config: ModelConfig) -> GPT:
    model = GPT(config, "dense").double()
    model.reset_parameters(0)
    return model


@pytest.mark.parametrize("size", [1, 7, 48])
def test_first_values_are_orthogonal_and_a_function_of_seed_and_name(size: int) -> None:
    config = replace(CONFIG, hidden_size=size)
    drawn = {}
    for name in NAMES:
        for seed in (1, 2):
            drawn[name, seed] = torch.empty(size, size, dtype=torch.float64)
            initialize_parameter(name, drawn[name, seed], config, seed)
            assert (drawn[name, seed] @ drawn[name, seed].T - torch.eye(size)).abs().max() < 1e-14
    again = torch.empty(size, size)
    initialize_parameter(NAMES[0], again, config, 1)
    assert torch.equal(again, drawn[NAMES[0], 1].float())
    if size > 1:
        assert len({tuple(value.flatten().tolist()) for value in drawn.values()}) == 4


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_equals_one_with_the_matrices_multiplied_into_embedding_and_head(tied: bool) -> None:
    model = gpt(replace(CONFIG, tie_embeddings=tied))
    plain = gpt(replace(CONFIG, embedding_projection=False))
    weights = model.state_dict()
    behind, before = (weights.pop(name) for name in NAMES)
    head = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    weights |= {"model.embed_tokens.weight": weights["model.embed_tokens.weight"] @ behind.T, "lm_head.weight": head @ before}
    found, untouched = (each.logits(TOKENS, torch.arange(12), BOUNDARIES, 12) for each in (model, plain))
    plain.load_state_dict(weights)
    expected = plain.logits(TOKENS, torch.arange(12), BOUNDARIES, 12)
    assert (found - expected).norm() < 1e-13 * expected.norm()
    assert (found - untouched).norm() > 0.1 * expected.norm()


def test_they_are_on_the_first_and_the_last_stage() -> None:
    config = replace(CONFIG, tie_embeddings=True, norm=NormOptions(embedding_norm=True))
    held = [{name for name, _ in GPT(config, stage=stage).named_parameters()} for stage in stages([1, 1])]
    only_first, only_last = held[0] - held[1], held[1] - held[0]
    assert {"model.embed_projection.weight", "model.embed_norm.weight"} < only_first
    assert {"model.head_projection.weight", "model.norm.weight"} < only_last


def test_a_projection_is_a_matrix_product() -> None:
    projection = EmbeddingProjection(8, partial=False)
    x = torch.randn(5, 8)
    assert torch.equal(projection(x), F.linear(x, projection.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.1])
def test_shrinking_changes_gradients_and_no_value(alpha: float, dtype: torch.dtype) -> None:
    x = torch.randn(5, 8).to(dtype).requires_grad_()
    grad = torch.randn(5, 8).to(dtype)
    y = shrink_gradient(x, alpha)
    assert torch.equal(y, x)
    y.backward(grad)
    assert torch.equal(x.grad, grad * alpha)


def test_a_tied_embedding_is_shrunk_as_an_input_only() -> None:
    gradients = {}
    for alpha in (1.0, 0.25):
        for tied in (False, True):
            model = gpt(replace(CONFIG, tie_embeddings=tied, embedding_gradient_shrink=alpha))
            if not tied:
                model.lm_head.load_state_dict(model.model.embed_tokens.state_dict())
            loss, _ = model(TOKENS, torch.arange(12), BOUNDARIES, 12, TOKENS, torch.ones(12))
            loss.backward()
            gradients[alpha, tied] = {name: parameter.grad for name, parameter in model.named_parameters()}
    name, head = "model.embed_tokens.weight", gradients[1.0, False]["lm_head.weight"]
    torch.testing.assert_close(gradients[0.25, False][name], 0.25 * gradients[1.0, False][name], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients[0.25, True][name], 0.25 * gradients[1.0, False][name] + head, rtol=1e-12, atol=1e-14)
    others = gradients[1.0, True].keys() - {name}
    assert all(torch.equal(gradients[0.25, True][other], gradients[1.0, True][other]) for other in others)
