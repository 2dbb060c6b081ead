"""The output head and cross-entropy in one step, so that the logits of a whole pack never exist at once."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS_PER_CHUNK = 2**22
"""Most logits alive at once: 16 MiB of float32, small beside a cache and large enough for a full-speed matrix product."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, loss_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropies of ``softmax(hidden @ weight.T)``, and each of them.

    ``hidden`` [T, h] and ``weight`` [V, h] share a dtype; ``labels`` int64 [T]; ``loss_weight`` float [T]. Returns the sum
    (a differentiable scalar) and the unweighted losses [T] (no gradient), both float32, or float64 for float64 input. A token
    of weight 0 is not computed: its label may be anything, its loss is reported as 0, and no gradient comes from it.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, loss_weight)


class _LinearCrossEntropy(torch.autograd.Function):
    """Takes the gradients while a chunk's logits are at hand; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, loss_weight: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        kept = loss_weight.nonzero().squeeze(1)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        token_loss = torch.zeros(len(hidden), dtype=wide, device=hidden.device)
        scale = loss_weight.to(wide)
        for rows in kept.split(max(1, LOGITS_PER_CHUNK // len(weight))):
            x, label = hidden[rows], labels[rows, None]
            logits = (x @ weight.T).to(wide)
            norm = logits.logsumexp(1, keepdim=True)
            token_loss[rows] = (norm - logits.gather(1, label)).squeeze(1)
            if not (need_hidden or need_weight):
                continue
            grad_logits = logits.sub_(norm).exp_()
            grad_logits.scatter_add_(1, label, grad_logits.new_full(label.shape, -1.0))
            grad_logits = grad_logits.mul_(scale[rows, None]).to(hidden.dtype)
            if need_hidden:
                grad_hidden[rows] = grad_logits @ weight
            if need_weight:
                grad_weight += grad_logits.T @ x
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(token_loss)
        return (token_loss * scale).sum(), token_loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grads = (None if grad is None else grad * grad_sum.to(grad.dtype) for grad in ctx.saved_tensors)
        return *grads, None, None
