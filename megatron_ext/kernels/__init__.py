"""One file per operation: its signature, its definition in plain PyTorch, its backends."""

from megatron_ext.kernels.newton_schulz import newton_schulz
from megatron_ext.kernels.varlen_attention import varlen_attention

__all__ = ["newton_schulz", "varlen_attention"]
