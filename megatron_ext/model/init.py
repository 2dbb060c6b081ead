"""Initial weights, as a function of the seed and the parameter's name alone."""

import hashlib
import math

import torch
from torch import Tensor

from megatron_ext.model.config import ModelConfig

RESIDUAL_PROJECTIONS = ("o_proj.weight", "down_proj.weight")
EMBEDDING_PROJECTIONS = ("embed_projection.weight", "head_projection.weight")


@torch.no_grad()
def initialize_parameter(name: str, parameter: Tensor, config: ModelConfig, seed: int) -> None:
    """Fill ``parameter`` (whole, any dtype and device) in place.

    Norms are 1, with the mean squares of those that keep any, and biases 0. Projections of embeddings are orthogonal. Other matrices are
    normal with deviation ``init_std``, divided by sqrt(2 layers) where they write into the residual stream (Radford et al. 2019, GPT-2,
    section 2.3), unless ``norm.depth_scaling`` scales the norms instead (both together are worse: Sun et al. 2025, arXiv:2502.05795).
    Drawn on the CPU, in float32 but for the orthogonal ones, so that neither the device nor the other parameters of the process change
    the values.
    """
    if name.endswith(("norm.weight", "running_square")):
        parameter.fill_(1.0)
    elif name.endswith((".bias", "running_product", "running_steps")):
        parameter.zero_()
    elif name.endswith(EMBEDDING_PROJECTIONS):
        parameter.copy_(_orthogonal(parameter.shape[0], _generator(seed, name)))
    else:
        std = config.init_std
        if name.endswith(RESIDUAL_PROJECTIONS) and not config.norm.depth_scaling:
            std /= math.sqrt(2 * config.num_layers)
        parameter.copy_(torch.randn(parameter.shape, generator=_generator(seed, name)) * std)


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, uniformly distributed, float64: so exact that another linear algebra library changes no float32."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
