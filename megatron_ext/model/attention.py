"""Causal self-attention inside each document of a pack, with grouped queries and rotary positions."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from megatron_ext.kernels.max_logits import max_attention_logits, max_chunk_logits
from megatron_ext.kernels.varlen_attention import varlen_attention
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.context import PackContext
from megatron_ext.model.max_logits import MaxLogits, Record
from megatron_ext.model.norm import RMSNorm
from megatron_ext.model.rope import apply_rope
from megatron_ext.parallel.ring import ring_attention
from megatron_ext.parallel.sequence import Attend, attended_heads, shared_attention
from megatron_ext.parallel.tensor import ColumnLinear, RowLinear, TensorParallel, outputs


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245), the heads divided over the tensor-parallel ranks.

    Where there are fewer key/value heads than ranks, neighbouring ranks hold the same one.

    Args:
        config: shape.
        backend: of ``varlen_attention``.
        tp: tensor-parallel ranks.
        layer: number of the layer in the whole model.
        max_logits: takes this rank's largest logits while training; they are those of the queries and keys that meet, after norms and
            rotation. None: they are not computed.
    """

    def __init__(self, config: ModelConfig, backend: str, tp: TensorParallel, layer: int, max_logits: MaxLogits | None = None) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.backend = backend
        self.tp = tp
        self.layer = layer
        self.max_logits = max_logits
        self.cache_quantizer: Callable[[Tensor], Tensor] | None = None
        """Rounds keys, after rotation (before it in an evaluation window), and values [T, heads, head_dim], as a cache of few bits would;
        None: they stay as they are."""
        queries = tp.heads(config.num_heads, config.head_dim)
        keys = tp.heads(config.num_kv_heads, config.head_dim)
        self.q_proj = ColumnLinear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = ColumnLinear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = ColumnLinear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = RowLinear(queries, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps, partial=True) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps, partial=True) if config.qk_norm else None

    def forward(self, x: Tensor, pack: PackContext) -> Tensor:
        """Map ``x`` [T, hidden], as it is outside a tensor-parallel region, to the same shape."""
        x = self.tp.enter(x, pack.tokens)
        q, k, v = map(self._heads, outputs(x, self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if pack.window is None:
            q, k = apply_rope(q, pack.cos, pack.sin), apply_rope(k, pack.cos, pack.sin)
        if self.cache_quantizer is not None:
            k, v = self.cache_quantizer(k), self.cache_quantizer(v)
        out = shared_attention(q, k, v, pack.sharing, self._attend(pack), self.tp.wire)
        return self.tp.leave(self.o_proj(out.flatten(1)))

    def _attend(self, pack: PackContext) -> Attend:
        """Attention of all tokens of the ranks that divide the heads: all of the pack, but for a ring."""
        if pack.window is not None:
            assert pack.sharing is None or pack.sharing.ring is None, "refused before the run"
            return pack.window.attend
        record = self._record(pack)
        if pack.sharing is not None and pack.sharing.ring is not None:
            observe = None if record is None else partial(_observe_chunks, record)
            return partial(ring_attention, chunks=pack.sharing.chunks, ring=pack.sharing.ring, observe=observe)
        attend = partial(varlen_attention, cu_seqlens=pack.cu_seqlens, max_seqlen=pack.max_seqlen, backend=self.backend)
        return attend if record is None else partial(_observed, attend, record, pack.cu_seqlens)

    def _record(self, pack: PackContext) -> Record | None:
        """Takes the largest logits of the heads that this rank attends with; None where nobody wants them."""
        if self.max_logits is None or not self.max_logits.enabled or not self.training:
            return None
        queries, keys = self.q_proj.split, self.k_proj.split
        heads = attended_heads(queries.size // self.head_dim, keys.size // self.head_dim, pack.sharing)
        first = queries.start // self.head_dim
        return partial(self.max_logits.add, self.layer, range(first + heads.start, first + heads.stop))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


def _observed(attend: Attend, record: Record, cu_seqlens: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    record(max_attention_logits(q, k, cu_seqlens))
    return attend(q, k, v)


def _observe_chunks(record: Record, q: Tensor, k: Tensor, causal: bool) -> None:
    record(max_chunk_logits(q, k, causal))
