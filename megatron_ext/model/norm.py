"""Norms whose statistics are of one token: RMSNorm, SSNorm, CRMSNorm and LayerNorm."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ext.kernels.accelerators import apex
from megatron_ext.kernels.norm import rms_norm


class Norm(nn.Module):
    """What the norms have in common.

    Args:
        size: width of what is normalised.
        eps: added to the mean square or variance.
        partial: each tensor-parallel rank normalises other vectors, so that their gradients of the gain must be summed.
        factor: the result is multiplied by it. It is a number of the program, neither learned nor saved.
    """

    one_gain = False
    """One learned gain for all channels."""

    def __init__(self, size: int, eps: float, partial: bool = False, factor: float = 1.0) -> None:
        super().__init__()
        self.size, self.eps, self.partial, self.factor = size, eps, partial, factor
        self.weight = nn.Parameter(torch.ones(1 if self.one_gain else size))

    @property
    def gain(self) -> Tensor:
        """Learned gain times ``factor``."""
        return self.weight if self.factor == 1.0 else self.weight * self.factor


class RMSNorm(Norm):
    """``kernels.norm.rms_norm`` with a learned gain for each channel."""

    backend = "torch"
    """Of ``rms_norm``, or ``apex``."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., size]."""
        if self.backend == "apex":
            return apex.rms_norm(x, self.gain, self.eps)
        return rms_norm(x, self.gain, self.eps, backend=self.backend)


class SSNorm(RMSNorm):
    """``rms_norm`` with one learned gain, so that no channel is favoured (Park et al. 2025, arXiv:2506.19697, section 3.2).

    It is ScaleNorm (Nguyen and Salazar 2019, arXiv:1910.05895, equation 5) with its scale divided by sqrt(size).
    """

    one_gain = True


class CRMSNorm(Norm):
    """RMSNorm of a vector of mean zero with one more channel than ``size``, which is not stored: it is minus the sum of the others.

    Jiang et al. 2023, arXiv:2305.14858, definition 2: x / sqrt((sum x^2 + (sum x)^2) / (size + 1) + eps), times a learned gain.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., size]; statistics as those of ``rms_norm``."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = wide.square().sum(-1, keepdim=True) + wide.sum(-1, keepdim=True).square()
        return (wide * torch.rsqrt(squares / (self.size + 1) + self.eps)).to(x.dtype) * self.gain


class LayerNorm(Norm):
    """Ba et al. 2016, arXiv:1607.06450, equation 4, with a learned gain and bias for each channel."""

    def __init__(self, size: int, eps: float, partial: bool = False, factor: float = 1.0) -> None:
        super().__init__(size, eps, partial, factor)
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., size]."""
        bias = self.bias if self.factor == 1.0 else self.bias * self.factor
        return F.layer_norm(x, (self.size,), self.gain, bias, self.eps)
