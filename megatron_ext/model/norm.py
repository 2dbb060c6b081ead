"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467, equation 4)."""

import torch
from torch import Tensor, nn


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of ``x`` [..., n] and scale it by ``weight`` [n]; the result has ``x``'s dtype.

    Statistics are float32 (float64 for float64 input) and the normalised values are rounded to ``x``'s dtype before the
    scaling, as transformers does, so that bfloat16 models agree with it.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normal.to(x.dtype)


class RMSNorm(nn.Module):
    """``rms_norm`` with a learned scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., size]."""
        return rms_norm(x, self.weight, self.eps)
