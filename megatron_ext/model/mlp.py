"""The gated feed-forward layer (SwiGLU: Shazeer 2020, arXiv:2002.05202, equation 6)."""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ext.model.config import ModelConfig
from megatron_ext.model.tiles import tiled
from megatron_ext.parallel.tensor import ColumnLinear, RowLinear, TensorParallel, outputs


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), the intermediate channels divided over the tensor-parallel ranks."""

    tile: int | None = None
    """Most tokens whose intermediate channels exist at once; None: all."""

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        channels = tp.rows(config.intermediate_size)
        self.tp = tp
        self.gate_proj = ColumnLinear(config.hidden_size, channels, bias=config.mlp_bias)
        self.up_proj = ColumnLinear(config.hidden_size, channels, bias=config.mlp_bias)
        self.down_proj = RowLinear(channels, config.hidden_size)

    def forward(self, x: Tensor, tokens: int) -> Tensor:
        """Map ``x`` [T, hidden], as it is outside a tensor-parallel region, to the same shape. ``tokens`` is T of the whole pack."""
        x = self.tp.enter(x, tokens)
        return self.tp.leave(self._gated(x) if self.tile is None else tiled(self._gated, x, list(self.parameters()), self.tile))

    def _gated(self, x: Tensor) -> Tensor:
        gate, up = outputs(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


def set_tile(model: nn.Module, tokens: int | None) -> None:
    """Let every ``MLP`` of ``model`` compute over tiles of so many tokens; None: at once."""
    for module in model.modules():
        if isinstance(module, MLP):
            module.tile = tokens
