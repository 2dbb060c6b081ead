"""One file per operation: its signature, its definition in plain PyTorch, its backends."""

from megatron_ext.kernels.varlen_attention import varlen_attention

__all__ = ["varlen_attention"]
