"""Activation checkpointing: compute again in backward what is cheap to compute or dear to keep."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_KEPT = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.mm.dtype,
        torch.ops.aten.addmm.default,
        torch.ops.aten._scaled_mm.default,
        torch.ops.aten._scaled_mm_v2.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    }
)
"""Matrix products and attention: nearly all of the arithmetic, and about half of the activations."""


def recomputed(what: str, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """``function(*arguments)`` with less kept for backward.

    Args:
        what: ``none``: everything is kept; ``full``: only the arguments (Chen et al. 2016, arXiv:1604.06174); ``selective``: the
            arguments and the results of matrix products and attention, while norms, rotations and the gate are computed again (after
            Korthikanti et al. 2022, arXiv:2205.05198, section 5; there attention is computed again, because it kept its scores).
        function: a part of the model.
        arguments: its arguments.
    """
    if what == "none":
        return function(*arguments)
    if what == "full":
        return checkpoint(function, *arguments, use_reentrant=False)
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    return checkpoint(function, *arguments, use_reentrant=False, context_fn=contexts)


def _keep_products(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
