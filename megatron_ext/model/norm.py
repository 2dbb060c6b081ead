"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467, equation 4)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of ``x`` [..., n] and scale it by ``weight`` [n]; the result has ``x``'s dtype.

    Statistics are float32 (float64 for float64 input) and the normalised values are rounded to ``x``'s dtype before the
    scaling, as transformers does, so that bfloat16 models agree with it.
    """
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps one number a row for backward and makes half the passes over memory that autograd would."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        size = x.shape[-1]
        wide_x, wide_grad, wide_weight = (tensor.to(scale.dtype) for tensor in (x, grad, weight))
        product = wide_x * wide_grad
        along_x = (product @ wide_weight).unsqueeze(-1).mul_(scale.pow(3)).div_(-size)
        grad_weight = scale.reshape(1, -1) @ product.reshape(-1, size)
        grad_x = torch.mul(wide_grad, wide_weight, out=product).mul_(scale).addcmul_(wide_x, along_x)
        return grad_x.to(x.dtype), grad_weight.squeeze(0).to(weight.dtype), None


class RMSNorm(nn.Module):
    """``rms_norm`` with a learned scale.

    Args:
        size: width of what is normalised.
        eps: added to the mean square.
        partial: each tensor-parallel rank normalises other vectors, so that their gradients of the scale must be summed.
    """

    def __init__(self, size: int, eps: float, partial: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.partial = partial
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., size]."""
        return rms_norm(x, self.weight, self.eps)
