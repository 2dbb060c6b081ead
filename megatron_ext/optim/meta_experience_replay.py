"""The meta-update of meta-experience replay (MER: Riemer et al. 2019, arXiv:1810.11910; in pretraining: Abbes et al. 2025, 2508.01908).

The replay itself is the data's: see ``data.replay``.
"""

import torch
from torch import Tensor

from megatron_ext.optim.extension import UpdateExtension
from megatron_ext.optim.ownership import OwnedBox

ANCHOR = "reptile_anchor"


class MetaExperienceReplay(UpdateExtension):
    """Reptile (Nichol et al. 2018, arXiv:1803.02999, algorithm 1) over the steps of a run.

    Every ``every`` updates, parameters go back towards where they were ``every`` updates ago: theta <- anchor + factor (theta - anchor),
    which becomes the next anchor. Moments of the rule stay as they are. The anchor is one value more for each parameter, of the dtype of
    the master weights, held by the owner.

    Args:
        every: updates from one anchor to the next, K of the papers.
        factor: share of the way that is kept, between 0 and 1.
    """

    def __init__(self, every: int, factor: float) -> None:
        self._every, self._factor = every, factor
        self._due = False

    def prepare(self, step: int) -> None:
        """See ``UpdateExtension``."""
        self._due = step % self._every == 0

    def first_state(self, part: OwnedBox, master: Tensor) -> dict[str, Tensor]:
        """See ``UpdateExtension``."""
        return {ANCHOR: master.detach().clone()}

    def on_update(self, part: OwnedBox, master: Tensor, state: dict[str, Tensor], before: Tensor | None) -> None:
        """See ``UpdateExtension``."""
        if self._due:
            master.copy_(torch.lerp(state[ANCHOR], master, self._factor))
            state[ANCHOR].copy_(master)
