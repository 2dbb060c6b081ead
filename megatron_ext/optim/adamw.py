"""AdamW (Loshchilov and Hutter 2019, algorithm 2): PyTorch's, with the betas that language models use."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` with betas (0.9, 0.95) and the fused implementation by default.

    Args:
        params: tensors or parameter groups.
        lr: learning rate.
        betas: decay of the first and second moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, multiplied by ``lr``.
        options: further arguments of ``torch.optim.AdamW``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        **options: Any,
    ) -> None:
        options.setdefault("fused", True)
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **options)


def decay_groups(
    named: Iterable[tuple[str, torch.Tensor]], weight_decay: float, shapes: Mapping[str, torch.Size] | None = None
) -> list[dict[str, Any]]:
    """Two parameter groups: matrices, which are decayed, and norms and biases (fewer than two dimensions), which are not.

    ``shapes``: of the parameters by name, where the tensors do not have them (divided by ZeRO).
    """
    named = [(tensor, tensor.shape if shapes is None else shapes[name]) for name, tensor in named]
    matrices = [tensor for tensor, shape in named if len(shape) >= 2]
    vectors = [tensor for tensor, shape in named if len(shape) < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
