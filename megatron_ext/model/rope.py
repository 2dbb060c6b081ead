"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864, equation 34), in the half-split layout of Llama checkpoints."""

import torch
from torch import Tensor


def rope_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, head_dim / 2] in ``dtype`` of the angle of each position (int [T]) and channel pair.

    Angles are float32 except for float64 models: the rounding that checkpoints of this family were trained with.
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, head_dim, 2, dtype=wide, device=positions.device) / head_dim
    angle = positions.to(wide)[:, None] * (1.0 / theta**exponent)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each head of ``x`` [T, heads, head_dim] by the angles of ``cos`` and ``sin`` [T, head_dim / 2]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
