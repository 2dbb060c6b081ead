"""Tensor-parallel layers: matrices divided over ranks, after Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053, section 3).

A region between ``enter`` and ``leave`` computes with a column-divided matrix, something by channels or heads, and a row-divided
matrix. Outside it every rank has all tokens, or, with ``shard_tokens``, ceil(T / n) of them, the last ranks' padded with zero rows
(Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2): the zero rows reach no gradient, because ``enter`` drops them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_ext.parallel.group import Group, Traffic
from megatron_ext.parallel.split import Split, even_split, head_split
from megatron_ext.precision.linear import LinearPrecision, SharedInput, quantized_linear
from megatron_ext.precision.wire import Wire, rounded_backward, rounded_forward


@dataclass(frozen=True)
class TensorParallel:
    """The tensor-parallel ranks of a model, and where its activations are divided by tokens."""

    group: Group
    shard_tokens: bool = False
    wire: Wire | None = None
    """Sends what is gathered as codes; values are rounded to them on every grid, so that the grid changes no result."""

    def enter(self, x: Tensor, tokens: int) -> Tensor:
        """From outside a region into it: [T, h], or this rank's [ceil(T / n), h] -> [T, h].

        With B the bytes of [T, h], sends backward 2 B (n - 1) / n; with ``shard_tokens`` B (n - 1) / n forward and backward, or forward
        the bytes of its codes.
        """
        if self.shard_tokens and self.group.size > 1:
            return _GatherTokens.apply(x, self, tokens)
        x = rounded_forward(x, self.wire)
        return x if self.group.size == 1 else _Copy.apply(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """Sum of the ranks' ``x`` [T, h] -> [T, h], or this rank's [ceil(T / n), h]. Sends as ``enter``, with forward for backward."""
        if self.shard_tokens and self.group.size > 1:
            return _ScatterTokens.apply(x, self)
        x = rounded_backward(x, self.wire)
        return x if self.group.size == 1 else _Sum.apply(x, self.group)

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' ``x`` [t, h], one after another [n t, h]."""
        if self.wire is None or not self.wire.codes:
            return self.group.all_gather(x)
        return self.wire.decode(self.group.all_gather(self.wire.encode(x)), x.shape[-1], x.dtype)

    def rows(self, total: int) -> Split:
        """This rank's part of a dimension."""
        return even_split(total, self.group.rank, self.group.size)

    def heads(self, heads: int, head_dim: int) -> Split:
        """This rank's part of a dimension of ``heads`` heads."""
        return head_split(heads, head_dim, self.group.rank, self.group.size)


def single() -> TensorParallel:
    """One rank that has all of every matrix."""
    return TensorParallel(Group("tp", (0,), 0, None, Traffic()))


class DividedLinear(nn.Linear):
    """A linear of which the tensor-parallel ranks hold parts, computed in low precision if it has been told so."""

    split: Split
    precision: LinearPrecision | None = None
    accelerated: Callable[[Tensor], Tensor] | None = None
    """Computes x W^T in low precision instead."""

    def forward(self, x: Tensor, shared: SharedInput | None = None) -> Tensor:
        """This rank's part of x W^T [T, out] from ``x`` [T, in]; ``shared``: what linears with this input have in common."""
        if self.accelerated is not None:
            y = self.accelerated(x)
            return y if self.bias is None else y + self.bias
        if self.precision is None:
            return F.linear(x, self.weight, self.bias)
        return quantized_linear(x, self.weight, self.bias, self.precision, shared)


class ColumnLinear(DividedLinear):
    """Some of the output features: rows ``split`` of the weight [out, in], inside a region."""

    def __init__(self, in_features: int, split: Split, bias: bool = False) -> None:
        super().__init__(in_features, split.size, bias=bias)
        self.split = split


class RowLinear(DividedLinear):
    """Some of the input features: columns ``split`` of the weight [out, in]; ``leave`` sums the ranks' results."""

    def __init__(self, split: Split, out_features: int) -> None:
        super().__init__(split.size, out_features, bias=False)
        self.split = split


def outputs(x: Tensor, *linears: ColumnLinear) -> list[Tensor]:
    """What each of some linears makes of one input, which is quantized once for all of them."""
    shared = SharedInput()
    return [linear(x, shared) for linear in linears]


class VocabularyEmbedding(nn.Embedding):
    """Rows ``split`` of an embedding [V, h]; ``leave`` sums the ranks' results."""

    def __init__(self, split: Split, hidden_size: int) -> None:
        super().__init__(split.size, hidden_size)
        self.split = split

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings [T, h] of ``tokens`` int [T]; zeros for tokens that other ranks hold."""
        if self.split.size == self.split.total:
            return F.embedding(tokens, self.weight)
        elsewhere = (tokens < self.split.start) | (tokens >= self.split.stop)
        rows = F.embedding((tokens - self.split.start).masked_fill(elsewhere, 0), self.weight)
        return rows.masked_fill(elsewhere[:, None], 0.0)


class _Copy(torch.autograd.Function):
    """Identity; gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.all_reduce(grad.clone(memory_format=torch.contiguous_format)), None


class _Sum(torch.autograd.Function):
    """Sum over the ranks; gradients pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return group.all_reduce(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherTokens(torch.autograd.Function):
    """All tokens from each rank's; gradients are summed and divided again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel, tokens: int) -> Tensor:
        ctx.group = tp.group
        return tp.gather(x)[:tokens]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.group.reduce_scatter(_padded(grad, ctx.group.size)), None, None


class _ScatterTokens(torch.autograd.Function):
    """Sum over the ranks, of which each gets its tokens; gradients are gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp, ctx.tokens = tp, len(x)
        return tp.group.reduce_scatter(_padded(x, tp.group.size))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.tp.gather(grad)[: ctx.tokens], None


def _padded(x: Tensor, parts: int) -> Tensor:
    """``x`` with zero rows up to the next multiple of ``parts``."""
    return F.pad(x, (0, 0, 0, -len(x) % parts))
