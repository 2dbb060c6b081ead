"""A function of each token alone, computed over tiles of tokens, so that what it makes on the way never exists for all of them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def tiled(function: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor], tile: int) -> Tensor:
    """``function(x)``, of which only ``x`` is kept; backward computes each tile again (TiledMLP of Bekman et al. 2025, arXiv:2506.13996).

    Args:
        function: maps [t, h] to [t, h], each row by itself, in the dtype of ``x``. Called under ``no_grad`` in forward and, if there is a
            backward, once more for each tile.
        x: [T, h]; T may be 0.
        parameters: all that ``function`` reads and that learns. Their gradients are added up over the tiles in at least float32.
        tile: most tokens of a tile, at least 1.
    """
    return _Tiled.apply(function, tile, x, *parameters)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], tile: int, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.function, ctx.tile = function, tile
        ctx.save_for_backward(x, *parameters)
        out = torch.empty_like(x)
        for rows, part in zip(out.split(tile), x.split(tile), strict=True):
            rows.copy_(function(part))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        learning = [parameter for parameter, needed in zip(parameters, ctx.needs_input_grad[3:], strict=True) if needed]
        sums = [torch.zeros_like(each, dtype=torch.promote_types(each.dtype, torch.float32)) for each in learning]
        grad_x = torch.empty_like(x)
        for rows, part, grad_part in zip(grad_x.split(ctx.tile), x.split(ctx.tile), grad.split(ctx.tile), strict=True):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                out = ctx.function(part)
            grad_rows, *grads = torch.autograd.grad(out, (part, *learning), grad_part)
            rows.copy_(grad_rows)
            for total, each in zip(sums, grads, strict=True):
                total += each
        found = iter(total.to(each.dtype) for total, each in zip(sums, learning, strict=True))
        return None, None, grad_x, *(next(found) if needed else None for needed in ctx.needs_input_grad[3:])
