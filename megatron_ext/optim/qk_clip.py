"""QK-clip: after an update, scale down what makes queries and keys of heads whose attention logits have grown too large."""

import re

import torch
from torch import Tensor

from megatron_ext.optim.ownership import OwnedBox
from megatron_ext.option_rules import require
from megatron_ext.parallel.placement import box_shape

_PROJECTION = re.compile(r"model\.layers\.(\d+)\.self_attn\.([qk])_proj\.(?:weight|bias)")


class QKClip:
    """The per-head clip of MuonClip (Kimi K2, arXiv:2507.20534, the section on MuonClip), for grouped queries.

    A head h whose largest logit S_h of a step exceeds tau has gamma_h = tau / S_h, every other one 1. Rows of q are multiplied by
    gamma^alpha, those of k by gamma^(1 - alpha): the same inputs then give logits gamma times as large, rotated or not. Query heads that
    read one key head share its gamma, the smallest of theirs. Values that are not finite clip nothing: no factor mends them.

    In effect only where nothing normalizes q and k after their projection (``qk_norm``).

    Args:
        tau: largest logit that is left alone; Kimi K2 took 100.
        alpha: q's share of the scaling, as an exponent.
        head_dim: rows of a head.
        num_heads: query heads of a layer.
        num_kv_heads: key heads of a layer, dividing ``num_heads``.

    Raises:
        ConfigError: ``tau`` is not more than 0, or ``alpha`` not between 0 and 1.
    """

    def __init__(self, tau: float, alpha: float, head_dim: int, num_heads: int, num_kv_heads: int) -> None:
        require((tau > 0, "tau", tau, "more than 0"), (0 <= alpha <= 1, "alpha", alpha, "between 0 and 1"))
        assert num_heads % num_kv_heads == 0, "checked with the model"
        self.tau = tau
        self.alpha = alpha
        self.heads = {"q": num_heads, "k": num_kv_heads}
        self.head_dim = head_dim
        self.clipped = torch.zeros((), dtype=torch.int64)
        """int64 []: query heads of the last step, of all layers, whose own largest logit exceeded tau."""
        self._factors: dict[str, Tensor] = {}

    @torch.no_grad()
    def observe(self, max_logits: Tensor) -> None:
        """Set the factors of a step from its largest logits, float32 [layers, query heads], reduced over all ranks and packs.

        Minus infinity stands for a head that saw nothing. Nothing waits for the device.
        """
        assert max_logits.shape[1] == self.heads["q"], "one value for each query head"
        above = (max_logits > self.tau) & max_logits.isfinite()
        self.clipped = above.sum()
        gamma = torch.where(above, self.tau / max_logits, 1.0).unflatten(1, (self.heads["k"], -1)).amin(2)
        self._factors = {"q": gamma**self.alpha, "k": gamma ** (1 - self.alpha)}

    @torch.no_grad()
    def apply(self, part: OwnedBox, master: Tensor) -> None:
        """Scale ``master`` in place, the values of any part of a parameter. What no q or k projection is stays as it is.

        Args:
            part: name, and box in the coordinates of the whole parameter; it may begin and end inside a head.
            master: of the box's shape.
        """
        found = _PROJECTION.fullmatch(part.name)
        if found is None:
            return
        assert self._factors, "observe comes first"
        assert master.shape == box_shape(part.box), "the values of this part"
        layer, which = int(found[1]), found[2]
        factors = self._factors[which][layer]
        rows_per_factor = self.head_dim * self.heads[which] // self.heads["k"]
        rows = torch.arange(*part.box[0], device=factors.device) // rows_per_factor
        by_row = factors[rows].to(master.device, master.dtype)
        master.mul_(by_row.view(-1, *[1] * (master.ndim - 1)))
