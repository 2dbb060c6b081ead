"""Attention of one chunk of queries over one chunk of keys, in a form whose results over several chunks of keys can be merged.

``dense`` is the definition. The flash kernels of PyTorch, whose memory does not grow with the product of the lengths, must agree with it
within the error of their dtype.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_ext.errors import ConfigError


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention, scores scaled by 1/sqrt(D), and the logarithm of the sum of the exponentials of each query's scores.

    Args:
        q: [Tq, H, D].
        k: [Tk, Hkv, D] with Hkv dividing H: query head i reads key head i // (H / Hkv).
        v: [Tk, Hkv, D].
        causal: query i sees keys 0 to i instead of all; Tq must be Tk.
        backend: as in ``select_backend``, None meaning ``auto``.

    Returns:
        [Tq, H, D] in ``q``'s dtype, and [H, Tq] in float32, float64 for float64. Without keys: zeros, and minus infinity.

    Raises:
        ConfigError: the backend cannot run here.
    """
    assert not causal or len(q) == len(k), "causal is for a chunk over itself"
    forward, _ = BACKENDS[select_backend(backend or "auto", q.device, q.dtype, q.shape[-1])]
    if len(q) and len(k):
        return forward(q, k, v, causal)
    return q.new_zeros(q.shape), q.new_full((q.shape[1], len(q)), float("-inf"), dtype=_wide(q))


def chunk_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What this chunk of keys adds to the gradients of attention over all chunks (Dao et al. 2022, arXiv:2205.14135, algorithm 4).

    Args:
        grad_out: gradient [Tq, H, D] of ``out``.
        q: as in ``chunk_attention``; so are ``k``, ``v``, ``causal``, ``backend`` and what is raised.
        k: of this chunk.
        v: of this chunk.
        out: [Tq, H, D], merged over all chunks of keys.
        lse: [H, Tq], merged over all chunks of keys.
        causal: of this chunk.
        backend: of both directions.

    Returns:
        Gradients of ``q``, ``k`` and ``v`` in float32, float64 for float64; query heads that share a key head are summed.
    """
    _, backward = BACKENDS[select_backend(backend or "auto", q.device, q.dtype, q.shape[-1])]
    if len(q) and len(k):
        grads = backward(grad_out, q, k, v, out, lse, causal)
        return grads[0].to(lse.dtype), grads[1].to(lse.dtype), grads[2].to(lse.dtype)
    return lse.new_zeros(q.shape), lse.new_zeros(k.shape), lse.new_zeros(v.shape)


def select_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The backend that runs when ``name`` is asked for on ``device`` with ``dtype`` and heads of ``head_dim`` channels.

    ``auto`` is the flash kernel of the device, never ``dense``.

    Raises:
        ConfigError: the backend is unknown or cannot run there; says what can.
    """
    if name != "auto" and name not in BACKENDS:
        raise ConfigError(f"the backend of chunk attention is {name!r}; accepted are auto, {', '.join(BACKENDS)}")
    chosen = f"flash_{device.type}" if name == "auto" else name
    half = dtype in (torch.bfloat16, torch.float16)
    able = {
        "dense": True,
        "flash_cpu": device.type == "cpu" and (half or dtype in (torch.float32, torch.float64)),
        "flash_cuda": device.type == "cuda" and half and head_dim % 8 == 0 and head_dim <= 256,
    }
    if not able.get(chosen, False):
        raise ConfigError(
            f"chunk attention ({name}) cannot run on {device.type} in {str(dtype).removeprefix('torch.')} with a head_dim of {head_dim}; "
            "accepted are cpu with float64, float32, bfloat16 or float16, and cuda with bfloat16 or float16 and a head_dim that is a "
            "multiple of 8 up to 256; the backend dense accepts everything, in memory that grows with the square of the length"
        )
    return chosen


def _dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    queries, keys, values = _wide_heads(q, k, v)
    scores = _scores(queries, keys, causal)
    return (scores.softmax(-1) @ values).transpose(0, 1).to(q.dtype), scores.logsumexp(-1)


def _dense_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    queries, keys, values = _wide_heads(q, k, v)
    grad, merged = (x.to(_wide(q)).transpose(0, 1) for x in (grad_out, out))
    probabilities = (_scores(queries, keys, causal) - lse[..., None]).exp()
    grad_scores = probabilities * (grad @ values.mT - (grad * merged).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    shared = [(x.mT @ y).unflatten(0, (k.shape[1], -1)).sum(1) for x, y in ((grad_scores, queries), (probabilities, grad))]
    return (grad_scores @ keys).transpose(0, 1), shared[0].transpose(0, 1), shared[1].transpose(0, 1)


def _scores(queries: Tensor, keys: Tensor, causal: bool) -> Tensor:
    """[H, Tq, Tk] from [H, Tq, D] and [H, Tk, D]."""
    scores = queries @ keys.mT * queries.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    return scores


def _wide_heads(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """[H, T, D] of each in float32 or wider, key heads repeated for the query heads that share them."""
    return [x.to(_wide(q)).repeat_interleave(q.shape[1] // x.shape[1], dim=1).transpose(0, 1) for x in (q, k, v)]


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(_batch(q), _batch(k), _batch(v), 0.0, causal)
    return out[0].transpose(0, 1), lse[0]


def _flash_cpu_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # In half precision the kernel would round its running sums over queries and shared heads, and take several times as long without AMX.
    grad_out, q, k, v, out = (_batch(x.to(lse.dtype)) for x in (grad_out, q, k, v, out))
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    dq, dk, dv = (grad[0].transpose(0, 1) for grad in backward(grad_out, q, k, v, out, lse[None], 0.0, causal))
    return dq, dk, dv


def _flash_cuda(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(_batch(q), _batch(k), _batch(v), 0.0, causal)
    return out[0].transpose(0, 1), lse[0]


def _flash_cuda_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = (None, None, len(q), len(k))
    # Read only where there is dropout.
    random_state = q.new_empty(2, dtype=torch.uint64)
    grad_out, q, k, v, out = (_batch(x) for x in (grad_out, q, k, v, out))
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    grads = backward(grad_out, q, k, v, out, lse[None].contiguous(), *lengths, 0.0, causal, random_state, random_state)
    dq, dk, dv = (grad[0].transpose(0, 1) for grad in grads)
    return dq, dk, dv


def _batch(x: Tensor) -> Tensor:
    """[1, H, T, D] of [T, H, D]. The kernels take channels to be neighbours in memory, and do not look."""
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(0, 1)[None]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


Forward = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor, Tensor]]
BACKENDS: dict[str, tuple[Forward, Backward]] = {
    "dense": (_dense, _dense_backward),
    "flash_cpu": (_flash_cpu, _flash_cpu_backward),
    "flash_cuda": (_flash_cuda, _flash_cuda_backward),
}
