"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864, equation 34), in the half-split layout of Llama checkpoints.

Channel i of a head is paired with channel i + head_dim / 2. Rolling a head by half its width exchanges the partners, so a rotation is
``x * cos + roll(x) * sin`` with the sine negated in the first half.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.model.rope_scaling import RopeScaling, rope_frequencies


def rope_tables(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine [T, head_dim] in ``dtype`` of the angle of each position (int [T]) and channel.

    Angles are float32 except for float64 models: the rounding that checkpoints of this family were trained with. Both are multiplied by
    the attention factor of ``scaling``; None: frequencies are those of the base ``theta`` alone.
    """
    scaling = scaling or RopeScaling()
    wide = torch.promote_types(dtype, torch.float32)
    angle = positions.to(wide)[:, None] * rope_frequencies(head_dim, theta, scaling, wide, positions.device)
    cos, sin = angle.cos() * scaling.attention_factor, angle.sin() * scaling.attention_factor
    return torch.cat((cos, cos), dim=1).to(dtype), torch.cat((-sin, sin), dim=1).to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each head of ``x`` [T, heads, head_dim] by the angles of ``rope_tables``."""
    return _Rotation.apply(x, cos[:, None], sin[:, None])


class _Rotation(torch.autograd.Function):
    """The gradient is the rotation back, times the same factor, so nothing of the size of ``x`` is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _rotate(grad, *ctx.saved_tensors, -1.0), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin, value=direction)
