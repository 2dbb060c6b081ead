"""Initial weights, as a function of the seed and the parameter's name alone."""

import hashlib
import math

import torch
from torch import Tensor

from megatron_ext.model.config import ModelConfig

RESIDUAL_PROJECTIONS = ("o_proj.weight", "down_proj.weight")


@torch.no_grad()
def initialize_parameter(name: str, parameter: Tensor, config: ModelConfig, seed: int) -> None:
    """Fill ``parameter`` (whole, any dtype and device) in place.

    Norms are 1 and biases 0. Matrices are normal with deviation ``init_std``, divided by sqrt(2 layers) where they write into the
    residual stream (Radford et al. 2019, GPT-2, section 2.3). Drawn in float32 on the CPU, so that neither the device nor the other
    parameters of the process change the values.
    """
    if name.endswith("norm.weight"):
        parameter.fill_(1.0)
    elif name.endswith(".bias"):
        parameter.zero_()
    else:
        std = config.init_std
        if name.endswith(RESIDUAL_PROJECTIONS):
            std /= math.sqrt(2 * config.num_layers)
        parameter.copy_(torch.randn(parameter.shape, generator=_generator(seed, name)) * std)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
