"""Attention of one pack by a block of data ranks, each of which has some of its tokens (DeepSpeed-Ulysses: Jacobs et al. 2023,
arXiv:2309.14509, section 3).

Outside attention every rank computes its tokens. For attention an all-to-all gives each rank all tokens of some heads, and a second one
gives the tokens back. Neither tokens nor heads need divide by the ranks. Where there are fewer key/value heads than ranks, a head goes to
every rank that has a query that reads it, and its gradients are summed on the way back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.parallel.group import Group
from megatron_ext.parallel.split import even_split
from megatron_ext.precision.wire import Wire, rounded_backward, rounded_forward

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sharing:
    """The ranks that share a pack, as one of them sees them."""

    heads: Group
    """Neighbours that divide the heads of attention."""
    tokens: tuple[int, ...]
    """Tokens of each rank of ``heads``; they lie one after another."""
    ring: Group | None = None
    """Ranks with the same heads and other tokens; None: ``heads`` have all tokens."""
    chunks: tuple[tuple[int, ...], ...] = ()
    """As ``ring_attention`` takes them."""


def shared_attention(q: Tensor, k: Tensor, v: Tensor, sharing: Sharing | None, attend: Attend, wire: Wire | None = None) -> Tensor:
    """Attention whose tokens are spread over ranks.

    Args:
        q: this rank's tokens [t, H, D]; t may be 0.
        k: [t, Hkv, D], Hkv dividing H.
        v: as ``k``.
        sharing: who has the other tokens; None: nobody.
        attend: attention of [T, h, D] and twice [T, hkv, D] with all tokens of the sharing ranks, giving [T, h, D].
        wire: sends q, k, v, the output and its gradient as codes; values are rounded to them however many ranks share. None: as they are.

    Returns:
        [t, H, D]. With n ranks, sends (n - 1) / n of q and of the output, and of k and v once for each rank that reads them; as much
        backward.
    """
    if sharing is None or sharing.heads.size == 1:
        q, k, v = (rounded_forward(x, wire) for x in (q, k, v))
        return rounded_forward(rounded_backward(attend(q, k, v), wire), wire)
    wire = wire if wire is not None and wire.codes else None
    heads = divide_heads(q.shape[1], k.shape[1], sharing.heads.size)
    q, k, v = _TokensToHeads.apply(sharing, heads, wire, q, k, v)
    readers = heads.readers(sharing.heads.rank)
    if readers is not None:
        index = torch.tensor(readers, device=k.device)
        k, v = k.index_select(1, index), v.index_select(1, index)
    return _HeadsToTokens.apply(sharing, heads, wire, attend(q, k, v))


def attended_heads(query_heads: int, kv_heads: int, sharing: Sharing | None) -> range:
    """Which of the query heads that ``shared_attention`` is given ``attend`` is given on this rank."""
    if sharing is None or sharing.heads.size == 1:
        return range(query_heads)
    return divide_heads(query_heads, kv_heads, sharing.heads.size).queries[sharing.heads.rank]


@dataclass(frozen=True)
class HeadRanges:
    """The heads of each rank."""

    queries: tuple[range, ...]
    """Of the ranks, one after another."""
    keys: tuple[range, ...]
    """Those that the rank's queries read; a head may be with several ranks."""
    group_size: int
    """Query heads that read one key/value head."""

    def readers(self, rank: int) -> list[int] | None:
        """For each query head of ``rank`` the place of its key head among those of ``rank``; None where kernels find it by division."""
        queries, keys = self.queries[rank], self.keys[rank]
        places = [head // self.group_size - keys.start for head in queries]
        by_division = [place * len(keys) // len(queries) for place in range(len(queries))]
        return None if places == by_division and len(queries) % len(keys) == 0 else places


def divide_heads(query_heads: int, kv_heads: int, ranks: int) -> HeadRanges:
    """Query heads spread as evenly as can be, at least one a rank, and the key/value heads that they read."""
    assert ranks <= query_heads, "the planner makes no larger block"
    group_size = query_heads // kv_heads
    parts = [even_split(query_heads, rank, ranks) for rank in range(ranks)]
    keys = tuple(range(part.start // group_size, (part.stop - 1) // group_size + 1) for part in parts)
    return HeadRanges(tuple(range(part.start, part.stop) for part in parts), keys, group_size)


class _TokensToHeads(torch.autograd.Function):
    """From some tokens of all heads to all tokens of some heads; queries, keys and values in one all-to-all.

    Their gradients are never coded: those of a head that several ranks have are summed.
    """

    @staticmethod
    def forward(
        ctx: Any, sharing: Sharing, heads: HeadRanges, wire: Wire | None, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.sharing, ctx.heads = sharing, heads
        q, k, v = _to_heads(sharing, [(q, heads.queries), (k, heads.keys), (v, heads.keys)], wire)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[None, None, None, Tensor, Tensor, Tensor]:
        heads = ctx.heads
        return None, None, None, *_to_tokens(ctx.sharing, [(dq, heads.queries), (dk, heads.keys), (dv, heads.keys)], None)


class _HeadsToTokens(torch.autograd.Function):
    """From all tokens of some heads to some tokens of all heads."""

    @staticmethod
    def forward(ctx: Any, sharing: Sharing, heads: HeadRanges, wire: Wire | None, out: Tensor) -> Tensor:
        ctx.sharing, ctx.heads, ctx.wire = sharing, heads, wire
        return _to_tokens(sharing, [(out, heads.queries)], wire)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, Tensor]:
        return None, None, None, _to_heads(ctx.sharing, [(grad, ctx.heads.queries)], ctx.wire)[0]


Parts = Sequence[tuple[Tensor, tuple[range, ...]]]
"""Tensors, and the heads of each that each rank computes."""


def _to_heads(sharing: Sharing, parts: Parts, wire: Wire | None) -> list[Tensor]:
    """From [t, H, D] each to [T, h, D] each."""
    if wire is not None:
        return _decoded(wire, parts, _to_heads(sharing, _encoded(wire, parts), None))
    group, first = sharing.heads, parts[0][0]
    tokens, head_dim = sharing.tokens[group.rank], first.shape[-1]
    counts = _head_counts(parts, group.size)
    sent = first.new_empty(tokens * sum(counts) * head_dim)
    for rank, buffer in enumerate(sent.split([tokens * count * head_dim for count in counts])):
        torch.cat([x[:, _slice(ranges[rank])] for x, ranges in parts], dim=1, out=buffer.view(tokens, counts[rank], head_dim))
    mine = counts[group.rank] * head_dim
    received = group.all_to_all(sent, [tokens * count * head_dim for count in counts], [mine * each for each in sharing.tokens])
    return list(received.view(sum(sharing.tokens), counts[group.rank], head_dim).split([len(r[group.rank]) for _, r in parts], dim=1))


def _encoded(wire: Wire, parts: Parts) -> Parts:
    return [(wire.encode(x), ranges) for x, ranges in parts]


def _decoded(wire: Wire, parts: Parts, received: Sequence[Tensor]) -> list[Tensor]:
    return [wire.decode(coded, x.shape[-1], x.dtype) for coded, (x, _) in zip(received, parts, strict=True)]


def _to_tokens(sharing: Sharing, parts: Parts, wire: Wire | None) -> list[Tensor]:
    """From [T, h, D] each to [t, H, D] each, the values of heads that several ranks have summed."""
    if wire is not None:
        return _decoded(wire, parts, _to_tokens(sharing, _encoded(wire, parts), None))
    group, first = sharing.heads, parts[0][0]
    tokens, head_dim = sharing.tokens[group.rank], first.shape[-1]
    counts = _head_counts(parts, group.size)
    mine = counts[group.rank] * head_dim
    sent = torch.cat([x for x, _ in parts], dim=1).flatten()
    received = group.all_to_all(sent, [mine * each for each in sharing.tokens], [tokens * count * head_dim for count in counts])
    buffers = [
        buffer.view(tokens, count, head_dim)
        for buffer, count in zip(received.split([tokens * count * head_dim for count in counts]), counts, strict=True)
    ]
    begin = [0] * group.size
    wholes = []
    for _, ranges in parts:
        pieces = [buffer[:, start : start + len(r)] for buffer, start, r in zip(buffers, begin, ranges, strict=True)]
        begin = [start + len(r) for start, r in zip(begin, ranges, strict=True)]
        wholes.append(_joined(pieces, ranges))
    return wholes


def _joined(pieces: Sequence[Tensor], ranges: tuple[range, ...]) -> Tensor:
    """All heads [t, H, D] from those of each rank; copies of a head are summed in at least float32, in the order of ranks."""
    heads = max(each.stop for each in ranges)
    if sum(map(len, ranges)) == heads:
        return torch.cat(list(pieces), dim=1)
    first = pieces[0]
    whole = first.new_zeros(first.shape[0], heads, first.shape[2], dtype=torch.promote_types(first.dtype, torch.float32))
    for piece, each in zip(pieces, ranges, strict=True):
        whole[:, _slice(each)] += piece
    return whole.to(first.dtype)


def _head_counts(parts: Parts, ranks: int) -> list[int]:
    return [sum(len(ranges[rank]) for _, ranges in parts) for rank in range(ranks)]


def _slice(heads: range) -> slice:
    return slice(heads.start, heads.stop)
