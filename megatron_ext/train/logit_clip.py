"""QK-clip in a run: the largest logits that the model saw, over all ranks, bound the projections after the update."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_ext.model.max_logits import MaxLogits
from megatron_ext.optim.ownership import OwnedBox
from megatron_ext.optim.qk_clip import QKClip
from megatron_ext.parallel.world import World


@dataclass
class LogitClip:
    """A ``Constraint``: what ``seen`` took during a step decides what ``clip`` scales at its end."""

    clip: QKClip
    seen: MaxLogits
    world: World
    largest: float = 0.0
    """Logit of the last step."""

    def prepare(self) -> None:
        """See ``Constraint``."""
        values = self.world.max(self.seen.values)
        self.seen.reset()
        self.clip.observe(values)
        self.largest = float(values.max())

    def apply(self, part: OwnedBox, master: Tensor) -> None:
        """See ``Constraint``."""
        self.clip.apply(part, master)

    def records(self) -> dict[str, Any]:
        """See ``Constraint``."""
        return {"max_logit": self.largest, "clipped_heads": int(self.clip.clipped)}
