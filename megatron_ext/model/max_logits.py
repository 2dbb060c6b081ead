"""The largest attention logits that a rank has seen, by layer and query head."""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_ext.model.config import ModelConfig

Record = Callable[[Tensor], None]
"""Takes the largest logits of some heads of a layer, fixed beforehand."""


class MaxLogits:
    """Running maxima since the last ``reset``, fed by the attention layers of one model.

    A rank sees the layers of its stage, the heads of its tensor-parallel part and, of packs that it shares, some of those: the largest of
    all ranks' ``values`` are those of the whole model. Packs in any number, and blocks that run forward again for activation
    checkpointing, change nothing about a maximum.

    Args:
        config: shape of the whole model.
        device: of ``values``, and of the model.
    """

    def __init__(self, config: ModelConfig, device: torch.device | str = "cpu") -> None:
        self.values = torch.full((config.num_layers, config.num_heads), float("-inf"), dtype=torch.float32, device=device)
        """float32 [layers, heads], numbered as in the whole model; minus infinity where this rank has seen nothing."""
        self.enabled = True
        """Whether layers are to compute them; that takes time."""

    def add(self, layer: int, heads: range, values: Tensor) -> None:
        """Take ``values`` [len(heads)] of query heads ``heads`` of ``layer``, numbered as in the whole model. NaN stays until ``reset``."""
        seen = self.values[layer, heads.start : heads.stop]
        torch.maximum(seen, values.to(seen.dtype), out=seen)

    def reset(self) -> None:
        """Forget everything."""
        self.values.fill_(float("-inf"))
