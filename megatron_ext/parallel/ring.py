"""Ring attention over packed documents (Liu et al. 2023, arXiv:2310.01889), causal, each document divided in a zig-zag.

Of R ranks each holds some queries for good, while keys and values go round. Under a causal mask contiguous parts would leave the first
ranks with little to do; so every document is cut into 2R chunks, of which rank j holds chunk j and chunk 2R-1-j (the zig-zag of Zhu's
ring-flash-attention, github.com/zhuzilin/ring-flash-attention): with equal chunks all ranks compute the same amount in every step.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.kernels.chunk_attention import chunk_attention, chunk_attention_backward, select_backend
from megatron_ext.parallel.activity import Pending
from megatron_ext.parallel.group import Group

Chunks = Sequence[Sequence[int]]
"""For every document of a pack the lengths of its 2R chunks, in tokens, in the order of the document."""
Observe = Callable[[Tensor, Tensor, bool], None]
"""Given some queries, the keys that they see, and whether key i is seen from query i on instead of by all."""


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, chunks: Chunks, ring: Group, *, backend: str | None = None, observe: Observe | None = None
) -> Tensor:
    """Causal softmax attention of each document over itself, scores scaled by 1/sqrt(D), its tokens divided over a ring of R ranks.

    Rank j holds of every document, in order, chunk j followed by chunk 2R-1-j: T = sum of the two lengths over the documents. Any length
    may be 0, all lengths of a rank too. All ranks of the ring call this at once, and go backward through it at once.

    In every rotation a rank sends to the next what it had from the previous: with B_i the bytes of rank i's k and v, and G_i their bytes
    in float32 (float64 for float64), rank j sends forward sum of B_i over all i but j + 1, and backward that and sum of G_i over all i
    but j. The next keys travel while these are used.

    Args:
        q: this rank's queries [T, H, D].
        k: this rank's keys [T, Hkv, D] with Hkv dividing H: query head i reads key head i // (H / Hkv).
        v: this rank's values [T, Hkv, D].
        chunks: lengths of the 2R chunks of every document, the same on all ranks.
        ring: the R ranks, in the order of the ring.
        backend: of ``chunk_attention``, None meaning ``auto``.
        observe: called forward with all parts of q and of the passing keys that meet, while the next keys travel.

    Returns:
        [T, H, D] in ``q``'s dtype. Partial results are merged, and gradients of keys and values summed, in float32 or wider.

    Raises:
        ConfigError: the backend cannot run here; before anything is sent.
    """
    assert all(len(lengths) == 2 * ring.size for lengths in chunks), "2R chunks a document"
    assert len(q) == len(k) == len(v) == _tokens(chunks, ring.rank), "the tokens of this rank's chunks"
    chosen = select_backend(backend or "auto", q.device, q.dtype, q.shape[-1])
    return _RingAttention.apply(q, k, v, chunks, ring, chosen, observe)


def visible_rows(chunks: Chunks, rank: int, source: int) -> Iterator[tuple[slice, slice, bool]]:
    """Which of rank ``rank``'s queries see which of rank ``source``'s keys, a document at a time; documents without any are left out.

    Yields:
        Rows of the queries, rows of the keys, and whether key i is seen from query i on (``rank`` is ``source``) instead of by all.
    """
    q_start = k_start = 0
    for lengths in chunks:
        q_first, q_both = lengths[rank], lengths[rank] + lengths[-1 - rank]
        k_first, k_both = lengths[source], lengths[source] + lengths[-1 - source]
        # Chunks of a lower rank lie outside those of a higher one, in the order of the document: low, high, high, low.
        q_from = q_first if source > rank else 0
        k_to = k_first if source < rank else k_both
        if q_from < q_both and k_to:
            yield slice(q_start + q_from, q_start + q_both), slice(k_start, k_start + k_to), source == rank
        q_start, k_start = q_start + q_both, k_start + k_both


class _RingAttention(torch.autograd.Function):
    """The rows of ``out`` that this rank holds; keeps q, k, v, the result and its lse for backward, whatever R is."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, chunks: Chunks, ring: Group, backend: str, observe: Observe | None) -> Tensor:
        kv = torch.stack((k, v))
        merged = q.new_zeros(q.shape, dtype=torch.promote_types(q.dtype, torch.float32))
        lse = merged.new_full((q.shape[1], len(q)), float("-inf"))
        for source, (keys, values) in _passing(kv, chunks, ring):
            for rows, columns, causal in visible_rows(chunks, ring.rank, source):
                part = chunk_attention(q[rows], keys[columns], values[columns], causal, backend=backend)
                _merge(merged[rows], lse[:, rows], *part)
                if observe is not None:
                    observe(q[rows], keys[columns], causal)
        out = merged.to(q.dtype)
        ctx.save_for_backward(q, kv, out, lse)
        ctx.chunks, ctx.ring, ctx.backend = chunks, ring, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, out, lse = ctx.saved_tensors
        ring, chunks = ctx.ring, ctx.chunks
        grad_q = lse.new_zeros(q.shape)
        own = lse.new_zeros(kv.shape)
        arriving: _Arriving | None = None
        for source, (keys, values) in _passing(kv, chunks, ring):
            grad_kv = own if source == ring.rank else lse.new_zeros(2, *keys.shape)
            for rows, columns, causal in visible_rows(chunks, ring.rank, source):
                inputs = (grad[rows], q[rows], keys[columns], values[columns], out[rows], lse[:, rows])
                dq, dk, dv = chunk_attention_backward(*inputs, causal, backend=ctx.backend)
                grad_q[rows] += dq
                grad_kv[0, columns] += dk
                grad_kv[1, columns] += dv
            # What this rank adds to the gradients of its own keys waits here; the sum of the others' goes round behind the keys.
            if source != ring.rank:
                _add(grad_kv, arriving, ring)
                arriving = _rotate(grad_kv, source, chunks, ring)
        _add(own, arriving, ring)
        grad_k, grad_v = own.to(kv.dtype)
        return grad_q.to(q.dtype), grad_k, grad_v, None, None, None, None


_Arriving = tuple[Tensor, list[Pending]]
"""What a rotation receives, once all its works are done."""


def _passing(kv: Tensor, chunks: Chunks, ring: Group) -> Iterator[tuple[int, Tensor]]:
    """(rank, its keys and values [2, T, Hkv, D]) of all ranks, this one's first; the next arrive while these are used."""
    for step in range(ring.size):
        source = (ring.rank - step) % ring.size
        arriving = _rotate(kv, source, chunks, ring) if step < ring.size - 1 else None
        yield source, kv
        if arriving is not None:
            kv = _arrived(arriving, ring)


def _rotate(x: Tensor, source: int, chunks: Chunks, ring: Group) -> _Arriving:
    """Begin to send ``x`` [2, tokens of ``source``, ...] on, and to receive the same of the rank before ``source``."""
    tokens = _tokens(chunks, (source - 1) % ring.size)
    return ring.start_rotate(x, (x.shape[0], tokens, *x.shape[2:]))


def _arrived(arriving: _Arriving, ring: Group) -> Tensor:
    received, works = arriving
    begin = time.perf_counter()
    for work in works:
        work.wait()
    ring.traffic.exchange_seconds += time.perf_counter() - begin if received.device.type == "cpu" else 0.0
    return received


def _add(total: Tensor, arriving: _Arriving | None, ring: Group) -> None:
    if arriving is not None:
        total += _arrived(arriving, ring)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Extend ``out`` [T, H, D] and ``lse`` [H, T] in place by attention over other keys (Milakov and Gimelshein 2018, arXiv:1805.02867)."""
    total = torch.logaddexp(lse, part_lse)
    old, new = ((x - total).exp().mT[..., None] for x in (lse, part_lse))
    out.mul_(old).add_(new * part)
    lse.copy_(total)


def _tokens(chunks: Chunks, rank: int) -> int:
    """Tokens that a rank holds."""
    return sum(lengths[rank] + lengths[-1 - rank] for lengths in chunks)
