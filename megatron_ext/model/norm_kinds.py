"""The norms of a model, as its configuration names them."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.accelerators import apex
from megatron_ext.kernels.norm import select_backend
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.norm import CRMSNorm, LayerNorm, Norm, RMSNorm, SSNorm
from megatron_ext.model.running_norm import PowerNorm, RunningNorm, UnifiedNorm
from megatron_ext.parallel.tensor import TensorParallel

KINDS: Mapping[str, type[Norm]] = {
    "rms": RMSNorm,
    "layer": LayerNorm,
    "ss": SSNorm,
    "crms": CRMSNorm,
    "power": PowerNorm,
    "unified": UnifiedNorm,
}
"""By the names of ``NormOptions.kind``."""


def build_norm(config: ModelConfig, partial: bool, layer: int | None = None) -> Norm:
    """A norm of the residual stream.

    Args:
        config: its kind, and whether depth scales it (LayerNorm Scaling: Sun et al. 2025, arXiv:2502.05795, equation 5).
        partial: as in ``Norm``.
        layer: number of its block in the whole model, from 0; None outside blocks.
    """
    factor = 1.0 if layer is None else depth_factor(config, layer)
    return KINDS[config.norm.kind](config.hidden_size, config.norm_eps, partial, factor)


def depth_factor(config: ModelConfig, layer: int) -> float:
    """What the norms of block ``layer``, from 0, are multiplied by."""
    return 1 / math.sqrt(layer + 1) if config.norm.depth_scaling else 1.0


def normalized(norm: Norm, x: Tensor, tp: TensorParallel, tokens: int) -> Tensor:
    """``norm`` of ``x``, as it is outside a tensor-parallel region, of a pack of which this rank's data line has ``tokens`` tokens."""
    return norm(x, _present(x, tp, tokens)) if isinstance(norm, RunningNorm) else norm(x)


def _present(x: Tensor, tp: TensorParallel, tokens: int) -> Tensor | None:
    """Which rows of ``x`` are tokens, where tokens are divided over the ranks; None: all."""
    if not tp.shard_tokens or len(x) * tp.group.size == tokens:
        return None
    return torch.arange(len(x), device=x.device) + tp.group.rank * len(x) < tokens


def set_backend(model: nn.Module, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Let the norms of ``model`` that have a choice be computed by ``backend``, of ``ModelOptions.norm_backend``; says which and why.

    Raises:
        ConfigError: it cannot run on ``device``, or cannot compute these norms.
    """
    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    if backend == "apex":
        reason = apex.status(device).services["RMSNorm"]
        reason = "has no norms with one gain" if any(norm.one_gain for norm in norms) else reason
        if reason:
            raise ConfigError(f"model.norm_backend: 'apex'; accepted here: torch, auto, because RMSNorm by apex {reason}")
        name, why = "apex", f"version {apex.status(device).version}"
    else:
        name, why = select_backend(backend, device, dtype)
    for norm in norms:
        norm.backend = name
    return f"{name} ({why})"
