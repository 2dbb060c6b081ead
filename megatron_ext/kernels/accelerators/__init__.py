"""Optional packages that compute faster what this package computes too: one adapter each. Chosen by options only, never required."""

import torch

from megatron_ext.kernels.accelerators import apex, flash_attn, transformer_engine
from megatron_ext.kernels.accelerators.adapter import Accelerator

__all__ = ["Accelerator", "survey"]


def survey(device: torch.device) -> list[Accelerator]:
    """What is installed, and what each would serve on ``device``, or why not."""
    return [adapter.status(device) for adapter in (transformer_engine, flash_attn, apex)]
