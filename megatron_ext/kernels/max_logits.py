"""The largest attention logit of each query head: q.k scaled, over all pairs of tokens that attend to each other.

``dense`` is the definition: all scores of the pack, with everything outside the diagonal blocks masked. The other functions compute a tile
of them at a time, so that memory does not grow with documents. None is part of a graph: nothing is kept for backward.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from megatron_ext.errors import ConfigError

CPU_CHUNK, GPU_CHUNK = 256, 1024
"""Tokens a side of a tile: few where its scores then stay in caches, many where a kernel takes long to launch."""

Tile = tuple[slice, slice, bool]
"""Rows of the queries, rows of the keys, and whether only some of the pairs attend."""


@torch.no_grad()
def max_attention_logits(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, *, causal: bool = True, scale: float | None = None, chunk: int | None = None
) -> Tensor:
    """Largest logit of each query head over the documents of a pack.

    Exact. Takes half of the products of attention forward, and beside the arguments memory for at most H * chunk * (chunk + 3 D) values
    of the result's dtype and a few integers a token, whatever the lengths. Documents that have up to a quarter of ``chunk`` tokens
    together are computed together.

    Args:
        q: [T, H, D].
        k: [T, Hkv, D] with Hkv dividing H: query head i reads key head i // (H / Hkv).
        cu_seqlens: int32 [documents + 1] from 0 to T; documents may be empty. Read by the host: on a GPU this waits for it.
        causal: a query sees the keys of its document up to its own, instead of all.
        scale: factor of q.k, more than 0; None: 1/sqrt(D).
        chunk: tokens a side of a tile; None: 256 on CPUs, 1024 on GPUs.

    Returns:
        [H] in float32, float64 for float64: minus infinity without tokens, NaN where a logit is NaN. Products of half precision are summed
        in float32.

    Raises:
        ConfigError: ``scale`` or ``chunk`` is not more than 0.
    """
    size = _checked_chunk(q, chunk)
    tokens, boundaries = torch.arange(len(q), device=q.device), cu_seqlens.to(torch.int64)
    document = torch.searchsorted(boundaries, tokens, right=True)
    last = tokens if causal else boundaries[document] - 1
    return _largest(q, k, _pack_tiles(cu_seqlens.tolist(), size, causal), boundaries[document - 1], last, scale)


@torch.no_grad()
def max_chunk_logits(q: Tensor, k: Tensor, causal: bool, *, scale: float | None = None, chunk: int | None = None) -> Tensor:
    """Largest logit of each query head of one chunk of queries over one chunk of keys; those over other keys are merged by ``maximum``.

    Args:
        q: [Tq, H, D].
        k: [Tk, Hkv, D] with Hkv dividing H.
        causal: query i sees keys 0 to i instead of all; Tq must be Tk.
        scale: as in ``max_attention_logits``; so are ``chunk``, memory, what is returned and what is raised.
        chunk: tokens a side of a tile.
    """
    assert not causal or len(q) == len(k), "causal is for a chunk over itself"
    tiles = _tiles(range(len(q)), range(len(k)), _checked_chunk(q, chunk), causal)
    rows = torch.arange(len(q), device=q.device)
    return _largest(q, k, tiles, torch.zeros_like(rows), rows, scale)


@torch.no_grad()
def dense(q: Tensor, k: Tensor, cu_seqlens: Tensor, causal: bool = True, scale: float | None = None) -> Tensor:
    """The definition of ``max_attention_logits``, in memory for H T (T + 1) values."""
    tokens = torch.arange(len(q), device=q.device)
    document = torch.searchsorted(cu_seqlens.to(tokens.dtype), tokens, right=True)
    visible = document[:, None] == document[None, :]
    if causal:
        visible &= tokens[:, None] >= tokens[None, :]
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)) * _factor(q, scale)
    nothing = q.new_full((q.shape[1], 1), float("-inf"))
    return torch.cat((nothing, scores.masked_fill(~visible, float("-inf")).flatten(1)), dim=1).amax(1)


def _checked_chunk(q: Tensor, chunk: int | None) -> int:
    size = (CPU_CHUNK if q.device.type == "cpu" else GPU_CHUNK) if chunk is None else chunk
    if size < 1:
        raise ConfigError(f"chunk of attention logits is {size}; accepted is 1 or more, or None")
    return size


def _factor(q: Tensor, scale: float | None) -> float:
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if not factor > 0:
        raise ConfigError(f"scale of attention logits is {factor}; accepted is more than 0, or None")
    return factor


def _pack_tiles(boundaries: Sequence[int], size: int, causal: bool) -> Iterator[Tile]:
    """Tiles that together have all pairs of a pack that attend, and no two the same."""
    for start, stop, documents in _runs(boundaries, size // 4):
        for rows, columns, partly in _tiles(range(start, stop), range(start, stop), size, causal):
            yield rows, columns, partly or documents > 1


def _runs(boundaries: Sequence[int], most: int) -> Iterator[tuple[int, int, int]]:
    """First token, end and number of neighbouring documents: as many as have up to ``most`` tokens together, or a longer one."""
    first = 0
    for last in range(1, len(boundaries)):
        if last + 1 == len(boundaries) or boundaries[last + 1] - boundaries[first] > most:
            yield boundaries[first], boundaries[last], last - first
            first = last


def _tiles(queries: range, keys: range, size: int, causal: bool) -> Iterator[Tile]:
    """Tiles of ``queries`` over ``keys``, the same ones if causal."""
    for first in queries[::size]:
        stop = min(first + size, queries.stop)
        for begin in range(keys.start, stop if causal else keys.stop, size):
            yield slice(first, stop), slice(begin, min(begin + size, keys.stop)), causal and begin == first


def _largest(q: Tensor, k: Tensor, tiles: Iterable[Tile], first: Tensor, last: Tensor, scale: float | None) -> Tensor:
    """Largest logit of each head in ``tiles``, where query i sees keys ``first[i]`` to ``last[i]`` if only some of the pairs attend."""
    largest = q.new_full((q.shape[1],), float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32))
    for rows, columns, partly in tiles:
        hidden = None
        if partly:
            keys = torch.arange(columns.start, columns.stop, device=q.device)
            hidden = (keys < first[rows, None]) | (keys > last[rows, None])
        torch.maximum(largest, _largest_product(q[rows], k[columns], hidden), out=largest)
    return largest * _factor(q, scale)


def _largest_product(q: Tensor, k: Tensor, hidden: Tensor | None) -> Tensor:
    """Of q.k [H] for [Tq, H, D] and [Tk, Hkv, D], without the pairs of which ``hidden`` [Tq, Tk] is true."""
    # The queries of all heads that read a key head are rows of one matrix: keys are not copied.
    queries = q.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3).flatten(1, 2)
    scores = _product(queries, k.permute(1, 2, 0)).view(q.shape[1], len(q), len(k))
    if hidden is not None:
        scores.masked_fill_(hidden, float("-inf"))
    return scores.flatten(1).amax(1)


def _product(queries: Tensor, keys: Tensor) -> Tensor:
    """[n, rows, D] times [n, D, Tk]; half precision is summed in float32 and not rounded."""
    if queries.dtype in (torch.bfloat16, torch.float16):
        if queries.is_cuda:
            return torch.bmm(queries, keys, out_dtype=torch.float32)
        queries, keys = queries.float(), keys.float()
    return torch.bmm(queries, keys)
