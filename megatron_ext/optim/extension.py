"""Where methods that change gradients or updates hook into the optimizer."""

from typing import Any, Protocol

from torch import Tensor

from megatron_ext.optim.ownership import OwnedBox


class UpdateExtension:
    """Changes what update rules get or what they did, part by part, in place. A method overrides what it needs.

    Tensors are float32 (float64 in float64 models). A part is some rows or all of a parameter; under tensor parallelism a rank sees its
    part of a divided matrix, but updates of matrices that a rule needs whole are seen whole. Each part is seen by its owner only. Of one
    that several ranks of the model hold, every holder does the same, so what a method does must follow from the part, the step, and what
    is equal on all ranks.
    """

    needs_whole = False
    """Parameters are to be owned whole, rather than by rows where the rule allows it."""
    needs_before = False
    """``on_update`` is to be given what a part was before the step, of which a copy is made for it."""

    def prepare(self, step: int) -> None:
        """All ranks call it at the end of the backward passes of update number ``step``, from 1 on, before the parts."""

    def on_gradient(self, part: OwnedBox, gradient: Tensor) -> None:
        """Before clipping and the rule: the gradient of the whole step, summed over all ranks."""

    def updated(self, part: OwnedBox) -> bool | Tensor:
        """What of a part the step updates: all, nothing, or bool [rows].

        The rest is frozen: its gradient counts as 0, also in the norm; its values, all state of the rule and of extensions stay as they
        are to the bit, whatever weight decay, ``on_update`` and constraints do. A part that is frozen whole costs nothing; frozen rows are
        copied for the time of the update. A number of steps that the rule keeps for a whole tensor goes on.
        """
        return True

    def first_state(self, part: OwnedBox, master: Tensor) -> dict[str, Tensor]:
        """What the method keeps of a part, by kind, as it begins: of the shape of ``master`` or of its first dimensions.

        Checkpoints have it beside the state of the rule; kinds are words that no rule and no other method uses.
        """
        return {}

    def on_update(self, part: OwnedBox, master: Tensor, state: dict[str, Tensor], before: Tensor | None) -> None:
        """After the rule and weight decay: change ``master``, the new values, or ``state``; ``before`` as ``needs_before`` says."""


class Constraint(Protocol):
    """Holds parameters within limits, after every update; of parts of any shape."""

    def prepare(self) -> None:
        """All ranks call it once a step, before the parts."""

    def apply(self, part: OwnedBox, master: Tensor) -> None:
        """Change ``master``, the values of ``part``, in place."""

    def records(self) -> dict[str, Any]:
        """What the metrics say about the last step, on every rank."""
