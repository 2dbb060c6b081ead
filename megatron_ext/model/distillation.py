"""What a frozen teacher adds to a student's loss: the divergence of their predictions, and the distance of their hidden states."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.model.loss import chunk_tokens
from megatron_ext.parallel.group import MAX, Group
from megatron_ext.parallel.split import Split, even_split
from megatron_ext.parallel.tensor import single

Head = tuple[Tensor, Tensor]
"""Hidden states [T, h] and output matrix [V, h], or this rank's rows of it, whose product are the logits."""


def linear_kl_divergence(
    student: Head,
    teacher: Head,
    token_weight: Tensor,
    rows: Split | None = None,
    group: Group | None = None,
    tile: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum over tokens of KL(teacher || student) of the two softmax distributions, and each of them (Hinton et al. 2015).

    The hidden sizes may differ, the vocabulary V not. ``token_weight`` float [T]. Returns the sum (a scalar, differentiable by the
    student's tensors) and the unweighted divergences [T] in nats (no gradient), float32, or float64 for float64 input. A token of
    weight 0 is not computed and reported as 0. ``tile``: most tokens whose logits exist at a time; None: as few
    as are computed without loss of speed.

    With ``rows`` and the tensor-parallel ``group``, as in ``linear_cross_entropy``: of each token with weight 5 numbers are all-reduced.
    """
    rows = rows or even_split(len(student[1]), 0, 1)
    group = group or single().group
    tile = tile or chunk_tokens(student[1].device, rows.total // group.size)
    return _LinearKL.apply(*student, *teacher, token_weight, group, tile)


class _LinearKL(torch.autograd.Function):
    """Takes the gradients while a chunk's logits are at hand; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, token_weight: Tensor, group: Group, tile: int
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight, dtype=wide)
        divergence = hidden.new_zeros(len(hidden), dtype=wide)
        token_weight = token_weight.to(wide)
        for rows in token_weight.nonzero().squeeze(1).split(tile):
            x = hidden[rows]
            divergence[rows], grad = _kl((x @ weight.T).to(wide), (teacher[rows] @ teacher_weight.T).to(wide), group)
            grad = (grad * token_weight[rows, None]).to(x.dtype)
            grad_hidden[rows] = grad @ weight
            grad_weight += grad.T @ x
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(divergence)
        return divergence @ token_weight, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = [grad * grad_sum.to(grad.dtype) for grad in ctx.saved_tensors]
        return *grads, None, None, None, None, None


def _kl(student: Tensor, teacher: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) of logits [n, V], divided by columns over the group: [n], and its gradient by the student's logits."""
    largest = group.all_reduce(torch.stack((student.amax(1), teacher.amax(1))), MAX)
    p, q = (student - largest[0, :, None]).exp(), (teacher - largest[1, :, None]).exp()
    sums = group.all_reduce(torch.stack((p.sum(1), q.sum(1), (q * (teacher - student)).sum(1))))
    log_sums = sums[:2].log() + largest
    divergence = sums[2] / sums[1] - log_sums[1] + log_sums[0]
    return divergence, p / sums[0, :, None] - q / sums[1, :, None]


def hidden_distance(student: Tensor, teacher: Tensor, kind: Literal["mse", "cosine"]) -> Tensor:
    """Distance of the hidden states [T, h] of each token: [T], float32, or float64 for float64 input.

    ``mse``: mean over channels of the squared difference; ``cosine``: 1 - the cosine, 1 where a state is 0.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(wide), teacher.to(wide)
    if kind == "mse":
        return (student - teacher).square().mean(1)
    return 1.0 - F.cosine_similarity(student, teacher, dim=1)


class _Attach(torch.autograd.Function):
    """Identity of the first argument; the second, a scalar, joins the loss that backward begins with."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype, ctx.device = loss.dtype, loss.device
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones((), dtype=ctx.dtype, device=ctx.device)


def attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    """``x``, whose backward adds the gradient of ``loss``, a scalar, to that of the loss which ``x`` leads to on whatever stage."""
    return _Attach.apply(x, loss)
