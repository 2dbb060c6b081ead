"""The adapter to NVIDIA's apex: AdamW in one kernel for many tensors, and RMSNorm in one.

It calls ``apex.optimizers.FusedAdam`` and ``apex.normalization.fused_layer_norm.fused_rms_norm_affine`` of version 0.1, a number that
apex has kept for years. Both need its CUDA extensions, which are built only when asked for. There is another project of the same name, a
toolkit for web sites: it is what pip installs as apex, it is recognised by the modules that it lacks, and it is never imported.
"""

from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.accelerators.adapter import Accelerator, gpu_obstacle, imported, installed_version, present, signature_obstacle

WRITTEN_AGAINST = "NVIDIA apex 0.1"
NORM = "apex.normalization.fused_layer_norm"
CALLS = {
    "apex.optimizers": {"FusedAdam": ("params", "lr", "bias_correction", "betas", "eps", "adam_w_mode", "weight_decay")},
    NORM: {"fused_rms_norm_affine": ("input", "weight", "normalized_shape", "eps")},
}
EXTENSIONS = {"apex.optimizers": "amp_C", NORM: "fused_layer_norm_cuda"}
CAPABILITY = (7, 0)


def status(device: torch.device) -> Accelerator:
    """What is installed and what it would serve on ``device``."""
    reason = None if _is_another_project() else gpu_obstacle(device, CAPABILITY)
    services = {name: reason or obstacle(module) for name, module in (("AdamW", "apex.optimizers"), ("RMSNorm", NORM))}
    return Accelerator("apex", WRITTEN_AGAINST, installed_version("apex"), services)


@cache
def obstacle(module: str) -> str | None:
    """Why ``module``, one of ``CALLS``, cannot be called, wherever, or None if it can."""
    if not present("apex"):
        return "needs the package apex of NVIDIA, which is not installed"
    if _is_another_project():
        return "needs the package apex of NVIDIA (github.com/NVIDIA/apex); installed is another project of that name"
    if not present(EXTENSIONS[module]):
        return f"needs apex built with its CUDA extensions; there is no {EXTENSIONS[module]}"
    found = imported(module)
    reason = found if isinstance(found, str) else signature_obstacle(found, CALLS[module], WRITTEN_AGAINST)
    return f"needs the package apex, which {reason}" if reason else None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The last dimension of ``x`` normalised by its root mean square and scaled (Zhang and Sennrich 2019, arXiv:1910.07467, equation 4).

    Args:
        x: [..., n] on a GPU.
        weight: [n] in the dtype of ``x``.
        eps: added to the mean square.

    Returns:
        [..., n] in the dtype of ``x``, rounded once, after the scaling: transformers rounds before it too.

    Raises:
        ConfigError: apex is missing, another project, or differs from what this file is written against.
    """
    if reason := obstacle(NORM):
        raise ConfigError(f"RMSNorm by apex {reason}")
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return fused_rms_norm_affine(input=x, weight=weight, normalized_shape=weight.shape, eps=eps)


def fused_adamw(params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) with the state of ``torch.optim.AdamW``: exp_avg, exp_avg_sq and step of each tensor.

    The arithmetic is AdamW's; the decay is added to the update rather than applied before it, which rounds otherwise. apex counts
    steps by parameter group: the parameters of a group that have gradients must have taken equally many.

    Args:
        params: float32 tensors on one GPU, or parameter groups of such.
        lr: learning rate.
        betas: decay of the first and second moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, multiplied by ``lr``.

    Raises:
        ConfigError: apex is missing, another project, or differs from what this file is written against; in ``step``: the parameters of
            a group have taken different numbers of steps.
    """
    if reason := obstacle("apex.optimizers"):
        raise ConfigError(f"AdamW by apex {reason}")
    from apex.optimizers import FusedAdam

    optimizer = FusedAdam(params=params, lr=lr, bias_correction=True, betas=betas, eps=eps, adam_w_mode=True, weight_decay=weight_decay)
    optimizer.register_step_pre_hook(_tell_steps)
    optimizer.register_step_post_hook(_keep_steps)
    return optimizer


def _tell_steps(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Steps taken, from the parameters to their groups, where apex reads them."""
    for group in optimizer.param_groups:
        steps = {int(optimizer.state[p].get("step", 0)) for p in group["params"] if p.grad is not None}
        if len(steps) > 1:
            raise ConfigError(f"AdamW by apex: parameters of one group have taken {sorted(steps)} steps; accepted: equally many")
        group["step"] = steps.pop() if steps else 0


def _keep_steps(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Steps taken, from the groups to the parameters, where checkpoints read them."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                optimizer.state[p]["step"] = torch.tensor(float(group["step"]))


def _is_another_project() -> bool:
    spec = find_spec("apex")
    if spec is None:
        return False
    folders = [Path(place) for place in spec.submodule_search_locations or []]
    return not any((folder / "optimizers").is_dir() and (folder / "normalization").is_dir() for folder in folders)
