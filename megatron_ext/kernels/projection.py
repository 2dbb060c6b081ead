"""The projection of AdamP and SGDP (Heo et al., ICLR 2021, arXiv:2006.08217, algorithms 1 and 2), in steps between which shards are added.

An update u that points along a parameter p only lengthens it. Where the gradient g is nearly orthogonal to p, which tells that p's scale
does not matter, the part of u along p is removed: of every channel (row), or of the layer (all rows together), or not at all.

  1. ``row_sums`` of what is here of each matrix: g.p, g.g, p.p, p.u of each row
  2. ``summarize``, ``project``: what is removed from each whole matrix; u becomes u - coefficient p, with a coefficient for each row

What has to be reduced between the ranks that hold a matrix together:

  cut between rows (column-parallel layers)   the ``Summary``, 5 numbers a matrix: ``cosines`` by maximum, ``totals`` by sum
  cut within rows (row-parallel layers)       the row sums, 4 numbers a row, by sum, before ``summarize``
  cut both ways                               the row sums over the ranks of a row, then the ``Summary`` over those that hold other rows

A fused tensor of several logical matrices (query, key and value; gate and up) is decided for each of them: pass its parts.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Matrices(NamedTuple):
    """Matrices of which rows lie one after another: float64 and int64 [matrices]."""

    rows: Tensor
    """How many rows of each are here."""
    channel_bound: Tensor
    """delta / sqrt(length of a whole row): a cosine below it is that of a random direction. 0, which no cosine is below, for vectors."""
    layer_bound: Tensor
    """delta / sqrt(size of the whole matrix), or 0."""


@lru_cache(maxsize=64)
def matrices(shapes: tuple[torch.Size, ...], delta: float, device: torch.device, rows: tuple[int, ...] | None = None) -> Matrices:
    """Describe whole tensors of ``shapes``, of which ``rows`` (default: all) are here. Tensors below two dimensions are one row each."""
    channel = [delta / math.sqrt(shape[1:].numel()) if len(shape) > 1 else 0.0 for shape in shapes]
    layer = [delta / math.sqrt(shape.numel()) if len(shape) > 1 else 0.0 for shape in shapes]
    rows = rows or tuple(shape[0] if len(shape) > 1 else 1 for shape in shapes)
    bounds = (torch.tensor(values, dtype=torch.float64, device=device) for values in (channel, layer))
    return Matrices(torch.tensor(rows, device=device), *bounds)


def as_rows(tensor: Tensor) -> Tensor:
    """[d0, ...] as [d0, rest], and a vector or scalar as [1, size]."""
    return tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1)


def row_sums(parameter: Tensor, gradient: Tensor, update: Tensor) -> Tensor:
    """g.p, g.g, p.p and p.u of each row of three tensors of one shape: [rows, 4] float64, summed in float32 or wider."""
    wide = torch.promote_types(parameter.dtype, torch.float32)
    p, g, u = (as_rows(tensor).to(wide) for tensor in (parameter, gradient, update))
    return torch.stack([torch.linalg.vecdot(a, b, dim=1) for a, b in ((g, p), (g, g), (p, p), (p, u))], dim=1).double()


class Summary(NamedTuple):
    """What the decision needs to know of each matrix."""

    cosines: Tensor
    """[matrices] float64: the largest absolute cosine between a row of the gradient and the same row of the parameter."""
    totals: Tensor
    """[matrices, 4] float64: row sums, added over the rows."""


def summarize(sums: Tensor, here: Matrices, eps: float) -> Summary:
    """Reduce row sums [all rows, 4] of whole rows to one entry a matrix, without waiting for the device."""

    def reduced(values: Tensor, how: str) -> Tensor:
        return torch.segment_reduce(values, how, lengths=here.rows, unsafe=True, initial=0.0)

    return Summary(reduced(_cosines(sums, eps), "max"), reduced(sums, "sum"))


class Projection(NamedTuple):
    """Which part of each update is removed. At most one of ``channel`` and ``layer`` is true: the channels are tried first."""

    channel: Tensor
    """[matrices] bool: every row loses its part along the row of the parameter."""
    layer: Tensor
    """[matrices] bool: the matrix loses its part along the parameter as a whole."""
    coefficients: Tensor
    """[all rows] float64: u <- u - coefficient p."""

    def decays(self, lr: float, weight_decay: float, wd_ratio: float) -> Tensor:
        """[matrices] float64: what weight decay multiplies the parameters by, ``wd_ratio`` times as strong where they are projected."""
        full, reduced = 1 - lr * weight_decay, 1 - lr * weight_decay * wd_ratio
        return torch.where(self.channel | self.layer, *(torch.full_like(self.coefficients[:1], x) for x in (reduced, full)))


def project(sums: Tensor, summary: Summary, here: Matrices, eps: float) -> Projection:
    """Decide on each whole matrix (algorithm 2, lines 8-9, as published in code: every channel below its bound, or else the layer).

    Args:
        sums: [all rows, 4] float64 of the rows that are here, each whole.
        summary: of the whole matrices.
        here: the matrices.
        eps: least norm in a cosine, and added to the norms that are divided by.
    """
    channel = summary.cosines < here.channel_bound
    layer = ~channel & (_cosines(summary.totals, eps) < here.layer_bound)
    # On a CPU a look at the decision is free.
    if sums.device.type == "cpu" and not bool((channel | layer).any()):
        return Projection(channel, layer, torch.zeros_like(sums[:, 0]))
    of_rows, of_layers = (s[:, 3] / (s[:, 2].sqrt() + eps).square() for s in (sums, summary.totals))
    spread = torch.stack([channel, layer, of_layers], dim=1).repeat_interleave(here.rows, dim=0, output_size=len(sums))
    zero = torch.zeros_like(of_rows)
    coefficients = torch.where(spread[:, 0] > 0, of_rows, torch.where(spread[:, 1] > 0, spread[:, 2], zero))
    return Projection(channel, layer, coefficients)


def _cosines(sums: Tensor, eps: float) -> Tensor:
    return sums[:, 0].abs() / (sums[:, 1].sqrt().clamp_min(eps) * sums[:, 2].sqrt().clamp_min(eps))
