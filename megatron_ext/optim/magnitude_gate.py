"""Updates gated by the magnitude of outputs (MIGU: Du et al. 2024, arXiv:2406.17245): rows whose outputs are small are frozen."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megatron_ext.optim.extension import UpdateExtension
from megatron_ext.optim.ownership import OwnedBox


class MagnitudeGate(UpdateExtension):
    """Of each linear, updates only the output channels of largest magnitude in the tokens of the step; the other rows are frozen.

    The paper masks gradients; here masked rows keep their values, moments and decay too, which masked gradients alone do not give.
    Parameters without magnitudes (embedding, head, norms) are always updated.

    Args:
        magnitudes: called by all ranks once a step; gives the magnitude of each output channel, [rows] of the whole matrix, by name of
            the linear (``model.layers.3.mlp.up_proj``), equal on all ranks.
        threshold: share of the rows of a linear that a step freezes, rounded down; of equal magnitudes the first rows are frozen.
    """

    def __init__(self, magnitudes: Callable[[], Mapping[str, Tensor]], threshold: float) -> None:
        self._magnitudes, self._threshold = magnitudes, threshold
        self._updated: dict[str, Tensor] = {}

    def prepare(self, step: int) -> None:
        """See ``UpdateExtension``."""
        self._updated = {name: self._largest(values) for name, values in self._magnitudes().items()}

    def updated(self, part: OwnedBox) -> bool | Tensor:
        """See ``UpdateExtension``."""
        rows = self._updated.get(part.name.rpartition(".")[0])
        return True if rows is None else rows[slice(*part.box[0])]

    def _largest(self, magnitudes: Tensor) -> Tensor:
        """Bool [rows]: all but the smallest ``threshold`` of them."""
        updated = torch.ones(len(magnitudes), dtype=torch.bool)
        updated[magnitudes.argsort(stable=True)[: int(self._threshold * len(magnitudes))]] = False
        return updated
