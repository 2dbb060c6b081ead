"""One layer of the decoder."""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_ext.model.attention import Attention
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.context import PackContext
from megatron_ext.model.mlp import MLP
from megatron_ext.model.norm import RMSNorm


class Block(nn.Module):
    """Pre-norm attention and MLP around a residual stream, optionally computed twice instead of keeping activations."""

    def __init__(self, config: ModelConfig, attention: str, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.self_attn = Attention(config, attention)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, pack: PackContext) -> Tensor:
        """Map the residual stream ``x`` [T, hidden] to [T, hidden]."""
        if self.activation_checkpointing and self.training:
            return checkpoint(self._forward, x, pack, use_reentrant=False)
        return self._forward(x, pack)

    def _forward(self, x: Tensor, pack: PackContext) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), pack)
        return x + self.mlp(self.post_attention_layernorm(x))
