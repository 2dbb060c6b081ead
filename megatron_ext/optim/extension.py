"""Where methods that change gradients or updates hook into the optimizer."""

from typing import Any, Protocol

from torch import Tensor

from megatron_ext.optim.ownership import OwnedBox


class UpdateExtension(Protocol):
    """Changes what the update rule gets or what it did, tensor by tensor, in place.

    Tensors are float32 (float64 in float64 models) and whole parameters, except that under tensor parallelism a rank sees its part of a
    divided matrix; updates of matrices that a rule needs whole are seen whole. Each is seen by its owner only; of one that several ranks
    of the model hold, every holder does the same.
    """

    def on_gradient(self, name: str, gradient: Tensor) -> None:
        """Before clipping and the rule: the gradient of the whole step, summed over all ranks."""

    def on_update(self, name: str, before: Tensor, after: Tensor) -> None:
        """After the rule and weight decay: the parameter ``before`` the step, and ``after`` it, to be changed."""


class Constraint(Protocol):
    """Holds parameters within limits, after every update; of parts of any shape."""

    def prepare(self) -> None:
        """All ranks call it once a step, before the parts."""

    def apply(self, part: OwnedBox, master: Tensor) -> None:
        """Change ``master``, the values of ``part``, in place."""

    def records(self) -> dict[str, Any]:
        """What the metrics say about the last step, on every rank."""
