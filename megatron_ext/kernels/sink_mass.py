"""How much of its attention each query gives to the first token of its document, the usual attention sink (Xiao et al. 2023,
arXiv:2309.17453, section 3.1).

``dense`` is the definition: the softmax over all scores of the pack. ``sink_mass`` asks an attention kernel instead, so that memory and
time are those of one attention forward, and tokens may be spread over ranks in whatever way that kernel knows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of q [T, H, D] over k and v [T, Hkv, D], giving [T, H, D]."""


@torch.no_grad()
def sink_mass(q: Tensor, k: Tensor, first: Tensor, attend: Attend) -> Tensor:
    """Probability that each query gives to the first token of its document: its attention, where values are 1 there and 0 elsewhere.

    Args:
        q: queries as they meet the keys [T, H, D].
        k: [T, Hkv, D] with Hkv dividing H.
        first: bool [T]: which tokens are the first of their document.
        attend: softmax attention of each document over itself.

    Returns:
        [T, H] in ``q``'s dtype, rounded as ``attend`` rounds. 1 for queries that are the first themselves, where attention is causal.
    """
    values = first[:, None, None].to(k.dtype).expand(k.shape).contiguous()
    return attend(q, k, values)[..., 0]


@torch.no_grad()
def dense(q: Tensor, k: Tensor, cu_seqlens: Tensor, causal: bool = True) -> Tensor:
    """The definition of ``sink_mass`` with scores scaled by 1/sqrt(D), in memory for H T^2 values of at least float32.

    ``q`` and ``k`` as there; ``cu_seqlens`` int32 [documents + 1] from 0 to T, documents may be empty. Returns float32 [T, H], float64 for
    float64.
    """
    tokens, boundaries = torch.arange(len(q), device=q.device), cu_seqlens.to(torch.int64)
    document = torch.searchsorted(boundaries, tokens, right=True)
    visible = document[:, None] == document[None, :]
    if causal:
        visible &= tokens[:, None] >= tokens[None, :]
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)) * q.shape[-1] ** -0.5
    probabilities = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return probabilities[:, tokens, boundaries[document - 1]].mT
