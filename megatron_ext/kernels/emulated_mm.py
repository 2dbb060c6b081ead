"""How products of narrow numbers are emulated where no tensor core knows their format: exact operands, sums in float32."""

import torch
from torch import Tensor


def operand_dtype(device: torch.device) -> torch.dtype:
    """What numbers of at most 8 significant bits are decoded to for ``emulated_mm``: bfloat16 where it is fast, float32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def emulated_mm(a: Tensor, b: Tensor) -> Tensor:
    """a b^T in float32, [M, N], of ``a`` [M, K] and ``b`` [N, K], both bfloat16 (CUDA) or float32.

    Numbers that are exact in bfloat16 are exact in TensorFloat-32 too, so that no setting of PyTorch for float32 products changes them.
    """
    # Autocast would round sums to bfloat16 before they are scaled.
    with torch.autocast(a.device.type, enabled=False):
        return torch.mm(a, b.mT, out_dtype=torch.float32) if a.dtype == torch.bfloat16 else torch.mm(a, b.mT)
