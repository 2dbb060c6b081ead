"""Attention inside each document of a pack: tokens of different documents never meet.

``dense`` is the definition: one score matrix over the whole pack with everything outside the diagonal blocks masked. The other backends
must agree with it within the error of their dtype.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.accelerators import flash_attn


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention of each document over itself, scores scaled by 1/sqrt(D).

    ``q`` [T, H, D]; ``k`` and ``v`` [T, Hkv, D] with Hkv dividing H (query head i reads key head i // (H / Hkv)); ``cu_seqlens`` int32
    [documents + 1] from 0 to T; ``max_seqlen`` at least the longest document. Returns [T, H, D] in ``q``'s dtype. Documents may be
    empty, and T may be 0. ``backend`` as in ``select_backend``, None meaning ``auto``; raises ConfigError if it cannot run here.
    """
    name, _ = select_backend(backend or "auto", q.device, q.dtype, q.shape[-1])
    if not len(q):
        return q + (k.sum() + v.sum())
    return BACKENDS[name](q, k, v, cu_seqlens, max_seqlen, causal)


def select_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """The backend that runs when ``name`` is asked for on ``device`` with ``dtype`` and heads of ``head_dim`` channels, and why.

    ``auto`` is ``varlen`` where it can run and ``sdpa`` elsewhere. Raises ConfigError for an unknown backend and for one that cannot run.
    """
    if name == "auto":
        obstacle = _obstacle("varlen", device, dtype, head_dim)
        return ("varlen", "auto: one kernel for the whole pack") if obstacle is None else ("sdpa", f"auto: varlen {obstacle}")
    if name not in BACKENDS:
        raise ConfigError(f"model.attention is {name!r}; accepted are auto, {', '.join(BACKENDS)}")
    if obstacle := _obstacle(name, device, dtype, head_dim):
        able = [candidate for candidate in BACKENDS if _obstacle(candidate, device, dtype, head_dim) is None]
        raise ConfigError(f"model.attention is {name!r}, which {obstacle}; able to run here: {', '.join(able)}")
    return name, "as configured"


def _dense(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> Tensor:
    tokens = torch.arange(len(q), device=q.device)
    document = torch.searchsorted(cu_seqlens.to(tokens.dtype), tokens, right=True)
    visible = document[:, None] == document[None, :]
    if causal:
        visible &= tokens[:, None] >= tokens[None, :]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    wide = torch.promote_types(q.dtype, torch.float32)
    probabilities = scores.to(wide).masked_fill(~visible, float("-inf")).softmax(-1).to(q.dtype)
    return torch.einsum("hqk,khd->qhd", probabilities, v)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> Tensor:
    lengths = cu_seqlens.diff().tolist()
    grouped = q.shape[1] != k.shape[1]
    outputs = []
    for document in zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v)), strict=True):
        if document[0].shape[2]:
            out = F.scaled_dot_product_attention(*document, is_causal=causal, enable_gqa=grouped)
            outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    window = (-1, 0) if causal else (-1, -1)
    grouped = q.shape[1] != k.shape[1]
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=window, enable_gqa=grouped)


Implementation = Callable[[Tensor, Tensor, Tensor, Tensor, int, bool], Tensor]
BACKENDS: dict[str, Implementation] = {"dense": _dense, "sdpa": _sdpa, "varlen": _varlen, "flash_attn": flash_attn.varlen_attention}


def _obstacle(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a backend cannot run, or None if it can."""
    if name in ("dense", "sdpa"):
        return None
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim > 256 or head_dim % 8:
        return f"needs a head_dim that is a multiple of 8 up to 256, not {head_dim}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    return flash_attn.obstacle() if name == "flash_attn" else None
