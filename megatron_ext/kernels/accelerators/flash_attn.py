"""The adapter to flash-attn (Dao 2023, arXiv:2307.08691): attention inside the documents of a pack.

It calls ``flash_attn.flash_attn_varlen_func`` as versions 2.7.0 to 2.8.3 have it, and nothing else. Versions 3 and 4 are other packages
(``flash_attn_interface``, ``flash_attn.cute``), which it does not call.
"""

from functools import cache

import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.accelerators.adapter import Accelerator, gpu_obstacle, imported, installed_version, present, signature_obstacle

WRITTEN_AGAINST = "flash-attn 2.7.0 to 2.8.3"
CALLS = {
    "flash_attn_varlen_func": (*("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "causal", "deterministic"),)
}
CAPABILITY = (8, 0)


def status(device: torch.device) -> Accelerator:
    """What is installed and what it would serve on ``device``."""
    services = {"attention": gpu_obstacle(device, CAPABILITY) or obstacle()}
    return Accelerator("flash-attn", WRITTEN_AGAINST, installed_version("flash-attn"), services)


@cache
def obstacle() -> str | None:
    """Why the package cannot be called, wherever, or None if it can."""
    if not present("flash_attn"):
        return "needs the package flash-attn, which is not installed"
    module = imported("flash_attn")
    reason = module if isinstance(module, str) else signature_obstacle(module, CALLS, WRITTEN_AGAINST)
    return f"needs the package flash-attn, which {reason}" if reason else None


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> Tensor:
    """Attention of each document over itself, as ``megatron_ext.kernels.varlen_attention`` defines it.

    Args:
        q: bfloat16 or float16 [T, H, D] on a GPU.
        k: [T, Hkv, D] with Hkv dividing H.
        v: as ``k``.
        cu_seqlens: int32 [documents + 1].
        max_seqlen: of the longest document.
        causal: a token sees none after it.

    Returns:
        [T, H, D] in ``q``'s dtype. The backward pass sums in a fixed order only while torch.use_deterministic_algorithms is on.

    Raises:
        ConfigError: the package is missing or differs from what this file is written against.
    """
    if reason := obstacle():
        raise ConfigError(f"attention by flash-attn {reason}")
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        causal=causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
