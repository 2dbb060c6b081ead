"""Rotary embedding against transformers' and against complex multiplication."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from megatron_ext.model.rope import apply_rope, rope_tables

POSITIONS = torch.tensor([0, 1, 2, 0, 1, 5000])


@pytest.mark.parametrize("head_dim", [2, 6, 64])
def test_equals_transformers(head_dim: int) -> None:
    config = LlamaConfig(hidden_size=3 * head_dim, num_attention_heads=3, head_dim=head_dim, rope_theta=50000.0)
    q = torch.randn(len(POSITIONS), 3, head_dim)
    cos, sin = LlamaRotaryEmbedding(config)(q, POSITIONS[None])
    theirs, _ = apply_rotary_pos_emb(q.transpose(0, 1)[None], q.transpose(0, 1)[None], cos, sin)
    ours = apply_rope(q, *rope_tables(POSITIONS, head_dim, 50000.0, torch.float32))
    torch.testing.assert_close(ours, theirs[0].transpose(0, 1), rtol=1e-6, atol=1e-6)


def complex_rotation(x: torch.Tensor, theta: float) -> torch.Tensor:
    half = x.shape[-1] // 2
    angle = POSITIONS[:, None].double() * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def test_float64_is_a_complex_rotation_and_so_is_its_gradient() -> None:
    x = torch.randn(len(POSITIONS), 2, 8, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    ours = apply_rope(x, *rope_tables(POSITIONS, 8, 100.0, torch.float64))
    theirs = complex_rotation(x, 100.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, grad)[0] for out in (ours, theirs)), rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    x = torch.randn(len(POSITIONS), 1, 4, dtype=torch.float64, requires_grad=True)
    tables = rope_tables(POSITIONS, 4, 10.0, torch.float64)
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, *tables), x)


def test_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64)

    def score(i: int, j: int) -> torch.Tensor:
        turned = [apply_rope(x, *rope_tables(torch.tensor([at]), 16, 1e4, torch.float64)) for x, at in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), rtol=1e-10, atol=1e-10)
    assert (score(9, 4) - score(9, 5)).abs() > 1e-6


def test_no_tokens() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    assert apply_rope(torch.empty(0, 2, 4), *rope_tables(empty, 4, 1e4, torch.float32)).shape == (0, 2, 4)
