"""Attention of an evaluation that sees only the first and the last tokens of a document, at distances that training knew."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.kernels.lambda_attention import Lambda, Pair, lambda_attention
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.rope import apply_rope, rope_tables
from megatron_ext.model.window_options import WindowOptions


@dataclass(frozen=True)
class EvaluationWindow:
    """What Lambda-shaped attention needs to know of a pack, whoever has its tokens. It turns queries and keys itself."""

    sees: Lambda
    cu_seqlens: Tensor
    near: Pair
    """Tables of ``rope_tables`` for the positions of all tokens of the pack."""
    limit: Pair
    """For the longest distance: [1, head_dim]."""
    origin: Pair
    """For position 0: [1, head_dim]."""

    @classmethod
    def of_pack(cls, options: WindowOptions, config: ModelConfig, cu_seqlens: Tensor, dtype: torch.dtype) -> EvaluationWindow:
        """The window over documents of ``cu_seqlens`` (int32 [documents + 1]) for queries and keys of ``dtype``."""
        sees = Lambda(options.global_tokens, options.local_tokens, options.longest_distance)
        lengths = cu_seqlens.diff().long()
        tokens = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
        ends = torch.tensor([0, sees.max_distance], device=cu_seqlens.device)

        def tables(positions: Tensor) -> Pair:
            return rope_tables(positions, config.head_dim, config.rope_theta, dtype, config.rope)

        near = tables(tokens - cu_seqlens[:-1].repeat_interleave(lengths))
        return cls(sees, cu_seqlens, near, tables(ends[1:]), tables(ends[:1]))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention [T, h, D] of all tokens of the pack from queries [T, h, D] and keys [T, hkv, D] before rotation."""
        near = apply_rope(q, *self.near), apply_rope(k, *self.near)
        far = apply_rope(q, *self.limit), apply_rope(k, *self.origin)
        return lambda_attention(near, far, v, self.cu_seqlens, self.sees)
