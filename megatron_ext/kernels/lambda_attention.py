"""Attention to the first and to the last tokens of each document, where no distance counts for more than a limit (LM-Infinite: Han et al.
2024, arXiv:2308.16137, section 4).

``dense`` is the definition: one score matrix over the whole pack. ``blockwise`` must agree with it within the error of its dtype.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ext.errors import ConfigError

ROWS = 256
"""Queries that are computed at once."""


class Lambda(NamedTuple):
    """What a query sees, in tokens of its document."""

    global_tokens: int
    """The first so many, at any distance."""
    local_tokens: int
    """The last so many, itself included."""
    max_distance: int
    """Longest distance between a query and a key that positions tell apart, at least ``local_tokens``."""


Pair = tuple[Tensor, Tensor]
"""Queries [T, H, D] and keys [T, Hkv, D], Hkv dividing H: query head i reads key head i // (H / Hkv)."""


def lambda_attention(near: Pair, far: Pair, v: Tensor, cu_seqlens: Tensor, sees: Lambda, *, backend: str | None = None) -> Tensor:
    """Causal softmax attention of each document over its first and last tokens, scores scaled by 1/sqrt(D).

    Args:
        near: queries and keys, each turned by its own position: for distances below the limit.
        far: queries all turned by the limit, keys not at all: for distances from there on.
        v: values [T, Hkv, D].
        cu_seqlens: int32 [documents + 1] from 0 to T; documents may be empty, and T may be 0.
        sees: which keys.
        backend: ``dense``, or ``blockwise`` in memory that grows with ``sees`` and not with the length; None: ``blockwise``.

    Returns:
        [T, H, D] in the dtype of the queries.

    Raises:
        ConfigError: there is no such backend.
    """
    assert sees.local_tokens <= sees.max_distance, "far scores are computed for the first tokens only"
    if (backend := backend or "blockwise") not in BACKENDS:
        raise ConfigError(f"the backend of Lambda-shaped attention is {backend!r}; accepted are {', '.join(BACKENDS)}")
    return BACKENDS[backend](near, far, v, cu_seqlens, sees)


def _dense(near: Pair, far: Pair, v: Tensor, cu_seqlens: Tensor, sees: Lambda) -> Tensor:
    tokens = torch.arange(len(v), device=v.device)
    document = torch.searchsorted(cu_seqlens.to(tokens.dtype), tokens, right=True)
    position = tokens - cu_seqlens[document - 1]
    distance = tokens[:, None] - tokens
    visible = (document[:, None] == document) & (distance >= 0)
    visible &= (distance < sees.local_tokens) | (position < sees.global_tokens)
    scores = torch.where(distance >= sees.max_distance, _scores(*far), _scores(*near))
    return _weighted(scores.masked_fill(~visible, float("-inf")), v, near[0].dtype)


def _blockwise(near: Pair, far: Pair, v: Tensor, cu_seqlens: Tensor, sees: Lambda) -> Tensor:
    out = torch.empty_like(near[0])
    for begin, end in pairwise(cu_seqlens.tolist()):
        for start in range(begin, end, ROWS):
            stop = min(start + ROWS, end)
            out[start:stop] = _rows(near, far, v, begin, slice(start, stop), sees)
    return out


def _rows(near: Pair, far: Pair, v: Tensor, begin: int, rows: slice, sees: Lambda) -> Tensor:
    """Some queries of the document that begins at ``begin``: over its first tokens, which all see, and over the last of the others."""
    first = slice(begin, min(begin + sees.global_tokens, rows.stop))
    last = slice(max(first.stop, rows.start - sees.local_tokens + 1), rows.stop)
    queries = torch.arange(rows.start, rows.stop, device=v.device)[:, None]
    to_first, to_last = (queries - torch.arange(keys.start, keys.stop, device=v.device) for keys in (first, last))
    near_first, far_first = (_scores(q[rows], k[first]) for q, k in (near, far))
    of_first = torch.where(to_first >= sees.max_distance, far_first, near_first).masked_fill(to_first < 0, float("-inf"))
    hidden = (to_last < 0) | (to_last >= sees.local_tokens)
    of_last = _scores(near[0][rows], near[1][last]).masked_fill(hidden, float("-inf"))
    return _weighted(torch.cat([of_first, of_last], -1), torch.cat([v[first], v[last]]), v.dtype)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """[H, Tq, Tk] from [Tq, H, D] and [Tk, Hkv, D], in float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return torch.einsum("qhd,khd->hqk", q.to(wide), k.to(wide)) * q.shape[-1] ** -0.5


def _weighted(scores: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    v = v.repeat_interleave(scores.shape[0] // v.shape[1], dim=1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.to(scores.dtype)).to(dtype)


BACKENDS: dict[str, Callable[[Pair, Pair, Tensor, Tensor, Lambda], Tensor]] = {"dense": _dense, "blockwise": _blockwise}
