"""The output head and cross-entropy in one step, so that the logits of a whole pack never exist at once."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.parallel.group import MAX, Group
from megatron_ext.parallel.split import Split, even_split
from megatron_ext.parallel.tensor import single

SMALLEST_CHUNK = 256
"""Tokens below which the matrix products of the head lose speed."""
LOGITS_PER_CHUNK = {"cpu": 2**21, "cuda": 2**26}
"""Logits alive at once where SMALLEST_CHUNK allows: what a CPU's cache holds; on a GPU what keeps it busy."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weight: Tensor,
    rows: Split | None = None,
    group: Group | None = None,
    tile: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropies of ``softmax(hidden @ weight.T)``, and each of them.

    ``hidden`` [T, h] and ``weight`` [V, h] share a dtype; ``labels`` int64 [T]; ``loss_weight`` float [T]. Returns the sum
    (a differentiable scalar) and the unweighted losses [T] (no gradient), both float32, or float64 for float64 input. A token
    of weight 0 is not computed: its label may be anything, its loss is reported as 0, and no gradient comes from it. ``tile``: most tokens
    whose logits exist at once; None: as ``chunk_tokens`` says.

    With ``rows`` and the tensor-parallel ``group`` each rank has some rows of the weight, [V / n, h] (Shoeybi et al. 2019,
    arXiv:1909.08053, section 3): the logits are never gathered; of each token with weight, 3 numbers of the dtype of the loss are
    all-reduced, which sends 6 (n - 1) / n of them. The gradient of ``hidden`` is this rank's part, for ``TensorParallel.enter`` to sum.
    """
    rows = rows or even_split(len(weight), 0, 1)
    group = group or single().group
    tile = tile or chunk_tokens(weight.device, rows.total // group.size)
    return _LinearCrossEntropy.apply(hidden, weight, labels, loss_weight, rows, group, tile)


class _LinearCrossEntropy(torch.autograd.Function):
    """Takes the gradients while a chunk's logits are at hand; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, loss_weight: Tensor, split: Split, group: Group, chunk: int
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        token_loss = hidden.new_zeros(len(hidden), dtype=wide)
        loss_weight = loss_weight.to(wide)
        # One buffer for all chunks: large blocks of fresh memory cost a CPU as much as the arithmetic on them.
        buffer = hidden.new_empty(min(chunk, len(hidden)), len(weight))
        for rows in loss_weight.nonzero().squeeze(1).split(chunk):
            x = hidden[rows]
            logits = torch.mm(x, weight.T, out=buffer[: len(rows)]).to(wide)
            token_loss[rows], grad_logits = _cross_entropy(logits, labels[rows] - split.start, loss_weight[rows], group)
            grad_logits = grad_logits.to(x.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                _accumulate(grad_weight, grad_logits.T, x)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(token_loss)
        return token_loss @ loss_weight, token_loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if grad is None else grad * grad_sum.to(grad.dtype) for grad in ctx.saved_tensors)
        return *grads, None, None, None, None, None


def _cross_entropy(logits: Tensor, labels: Tensor, loss_weight: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Losses [n] and the gradient of their weighted sum, which overwrites ``logits``; labels count from this rank's first row."""
    elsewhere = ((labels < 0) | (labels >= logits.shape[1]))[:, None]
    labels = labels[:, None].masked_fill(elsewhere, 0)
    target = logits.gather(1, labels).masked_fill_(elsewhere, 0.0)
    largest = group.all_reduce(logits.amax(1, keepdim=True), MAX)
    exponentials = logits.sub_(largest).exp_()
    total, target = group.all_reduce(torch.stack((exponentials.sum(1, keepdim=True), target)))
    losses = total.log() + largest - target
    loss_weight = loss_weight[:, None]
    grad = exponentials.mul_(loss_weight / total)
    grad.scatter_add_(1, labels, -loss_weight.masked_fill(elsewhere, 0.0))
    return losses.squeeze(1), grad


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without a temporary where the dtypes allow."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def chunk_tokens(device: torch.device, rows: int) -> int:
    """Tokens of a chunk; the same on all tensor-parallel ranks, though they may hold different numbers of rows."""
    return max(SMALLEST_CHUNK, LOGITS_PER_CHUNK.get(device.type, 2**26) // rows)
