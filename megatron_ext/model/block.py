"""One layer of the decoder."""

from torch import Tensor, nn

from megatron_ext.model.attention import Attention
from megatron_ext.model.checkpointing import recomputed
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.context import PackContext
from megatron_ext.model.max_logits import MaxLogits
from megatron_ext.model.mlp import MLP
from megatron_ext.model.norm import RMSNorm
from megatron_ext.parallel.tensor import TensorParallel


class Block(nn.Module):
    """Pre-norm attention and MLP around a residual stream.

    Args:
        config: shape.
        attention: backend of ``varlen_attention``.
        tp: tensor-parallel ranks.
        layer: number of the layer in the whole model.
        recompute: what backward computes again instead of keeping it: see ``recomputed``.
        max_logits: as in ``Attention``.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: str,
        tp: TensorParallel,
        layer: int,
        recompute: str = "none",
        max_logits: MaxLogits | None = None,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.self_attn = Attention(config, attention, tp, layer, max_logits)
        self.mlp = MLP(config, tp)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps, partial=tp.shard_tokens)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps, partial=tp.shard_tokens)

    def forward(self, x: Tensor, pack: PackContext) -> Tensor:
        """Map the residual stream ``x`` [T, hidden] (this rank's tokens of it, where they are divided) to the same shape."""
        if self.training:
            return recomputed(self.recompute, self._forward, x, pack)
        return self._forward(x, pack)

    def _forward(self, x: Tensor, pack: PackContext) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), pack)
        return x + self.mlp(self.post_attention_layernorm(x), pack.tokens)
