"""Seconds that packs take, from the lengths of their documents: what a planner compares plans by.

A pack of ``degree`` ranks takes ``per_pack`` + (sum of the documents' work) / ``degree`` + its exchanges. Work is quadratic in the length
of a document, because of attention, and linear, because of everything else. All-to-alls move queries, keys, values and outputs
(Jacobs et al. 2023, arXiv:2309.14509, section 3); in a ring, keys and values pass from rank to rank.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Seconds by bytes: straight lines through measured points, before the first and after the last along the nearest line.

    One point means a constant; no points, nothing.
    """

    bytes: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()

    @classmethod
    def line(cls, latency: float, bytes_per_second: float) -> "Curve":
        """``latency`` seconds and then ``bytes_per_second``."""
        return cls((0.0, bytes_per_second), (latency, latency + 1.0))

    def scaled(self, factor: float) -> "Curve":
        """The curve with ``factor`` times the seconds."""
        return Curve(self.bytes, tuple(factor * each for each in self.seconds))

    def __call__(self, sent: Array | float) -> Array:
        """Seconds for ``sent`` bytes, of any shape; 0 for 0 bytes."""
        sent = np.asarray(sent, dtype=np.float64)
        if len(self.bytes) < 2:
            return np.where(sent > 0, self.seconds[0] if self.seconds else 0.0, 0.0)
        x, y = np.array(self.bytes), np.array(self.seconds)
        part = np.clip(np.searchsorted(x, sent) - 1, 0, len(x) - 2)
        slope = (y[part + 1] - y[part]) / (x[part + 1] - x[part])
        return np.where(sent > 0, np.maximum(0.0, y[part] + slope * (sent - x[part])), 0.0)


@dataclass(frozen=True)
class AttentionShape:
    """What attention exchanges, on one tensor-parallel rank. The default exchanges nothing."""

    layers: int = 0
    """Layers that one rank computes."""
    query_heads: int = 1
    kv_heads: int = 1
    head_dim: int = 1
    element_bytes: int = 2
    """Of activations."""
    forwards: int = 1
    """Times that attention runs forward for each backward: 2 where activations are computed again."""


@dataclass(frozen=True)
class CostModel:
    """Coefficients of one model on one machine. Seconds are of forward and backward together, through all layers of a rank.

    The defaults describe ranks on which time is tokens and communication is free.
    """

    tokens_per_rank: int
    """Most tokens of a pack for each of its ranks: what fits in memory."""
    per_token: float = 1.0
    """Seconds a token."""
    per_token_squared: float = 0.0
    """Seconds a squared token of a document, where attention runs at its full rate."""
    efficiency_tokens: tuple[float, ...] = ()
    """Lengths of documents, ascending, at which ``efficiency`` was measured; between them it is interpolated, beyond them constant."""
    efficiency: tuple[float, ...] = ()
    """Share of its full rate at which attention runs, in (0, 1]."""
    per_pack: float = 0.0
    """Seconds that every pack costs besides."""
    per_step: float = 0.0
    """Seconds that every step costs besides: gradients to their owners, the update, new values."""
    attention: AttentionShape = AttentionShape()
    all_to_all: tuple[Curve, ...] = ()
    """Seconds of one all-to-all by the bytes that a rank sends to others: of 2, 4, 8 ... ranks. Larger blocks are as the last."""
    ring_step: Curve = Curve()
    """Seconds until a rank has what its neighbour in a ring sent, by bytes."""

    def scaled(self, compute: float, exchange: float) -> "CostModel":
        """The model with all compute and all exchanges these factors as long."""
        return replace(
            self,
            per_token=self.per_token * compute,
            per_token_squared=self.per_token_squared * compute,
            per_pack=self.per_pack * compute,
            all_to_all=tuple(curve.scaled(exchange) for curve in self.all_to_all),
            ring_step=self.ring_step.scaled(exchange),
        )

    @property
    def largest_head_block(self) -> int:
        """Most ranks that heads can be divided over: the largest power of two not above the number of query heads."""
        return 1 << (self.attention.query_heads.bit_length() - 1)

    def degrees(self, devices: int, largest: int | None = None) -> list[int]:
        """Sizes of blocks: powers of two up to ``devices`` and ``largest`` (None: the ranks that heads can be divided over)."""
        limit = min(devices, largest or self.largest_head_block)
        return [1 << power for power in range(limit.bit_length())]

    def ring_of(self, degree: int) -> int:
        """Ranks in the ring of a block: 1 as far as heads can be divided over the block."""
        return max(1, degree // self.largest_head_block)

    def capacity(self, degree: int) -> int:
        """Most tokens of a pack of ``degree`` ranks."""
        return self.tokens_per_rank * degree

    def work(self, lengths: Array | NDArray[np.integer]) -> Array:
        """Seconds that documents of these lengths take on one rank alone, without what a pack costs besides."""
        tokens = np.asarray(lengths, dtype=np.float64)
        rate = np.interp(tokens, self.efficiency_tokens, self.efficiency) if self.efficiency else 1.0
        return self.per_token * tokens + self.per_token_squared * tokens * tokens / rate

    def pack_seconds(self, work: Array | float, tokens: Array | float, degree: int) -> Array:
        """Seconds of packs of ``degree`` ranks whose documents have these sums of ``work`` and of tokens."""
        return self.per_pack + np.asarray(work) / degree + self.exchange_seconds(tokens, degree)

    def exchange_seconds(self, tokens: Array | float, degree: int) -> Array:
        """Seconds that packs of ``tokens`` tokens on ``degree`` ranks spend in exchanges."""
        if degree == 1:
            return np.zeros_like(np.asarray(tokens, dtype=np.float64))
        shape, ring = self.attention, self.ring_of(degree)
        seconds = np.zeros_like(np.asarray(tokens, dtype=np.float64))
        if degree > ring and self.all_to_all:
            curve = self.all_to_all[min(len(self.all_to_all), (degree // ring).bit_length() - 1) - 1]
            there, back = self.all_to_all_bytes(tokens, degree)
            seconds = shape.layers * (shape.forwards + 1) * (curve(there) + curve(back))
        if ring > 1:
            there, back = self.ring_step_bytes(tokens, degree)
            seconds = seconds + shape.layers * (ring - 1) * (shape.forwards * self.ring_step(there) + self.ring_step(back))
        return seconds

    def all_to_all_bytes(self, tokens: Array | float, degree: int, ring: int | None = None) -> tuple[Array, Array]:
        """Bytes that a rank sends to others of its block in one layer's forward: of queries, keys and values; of outputs.

        ``ring`` is that of the pack; None: ``ring_of(degree)``.

        Key/value heads are sent to every rank that has a query head that reads them. Exact where the ranks divide tokens and heads, a
        mean elsewhere. Backward sends as much as forward.
        """
        shape, ranks = self.attention, degree // (ring or self.ring_of(degree))
        a_head = np.asarray(tokens, dtype=np.float64) / degree * (ranks - 1) / ranks * shape.head_dim * shape.element_bytes
        return a_head * (shape.query_heads + 2 * max(shape.kv_heads, ranks)), a_head * shape.query_heads

    def ring_step_bytes(self, tokens: Array | float, degree: int, ring: int | None = None) -> tuple[Array, Array]:
        """Bytes a rank sends in one of the ring - 1 steps of a layer: forward, keys and values; backward, float32 gradients too."""
        shape, ring = self.attention, ring or self.ring_of(degree)
        heads = max(1, shape.kv_heads * ring // degree)
        elements = np.asarray(tokens, dtype=np.float64) / ring * 2 * heads * shape.head_dim
        return elements * shape.element_bytes, elements * (shape.element_bytes + max(4, shape.element_bytes))
