"""What a user can say about steps whose update would do harm."""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.option_rules import require


@dataclass
class RollbackOptions:
    """When a run goes back to its last checkpoint and passes over the documents that it read since."""

    skips: int = 3
    """Skipped steps among the last ``within`` after which the run goes back."""
    within: int | None = None
    """Steps that are looked at; null: ``skips``, so that they follow each other."""
    most: int = 3
    """Times that a run may go back. When it would again, it stops."""

    @property
    def span(self) -> int:
        """Steps that are looked at."""
        return self.within or self.skips

    def __post_init__(self) -> None:
        require(
            (self.skips >= 1, "skips", self.skips, "at least 1"),
            (self.within is None or self.within >= self.skips, "within", self.within, f"at least skips ({self.skips}), or null"),
            (self.most >= 1, "most", self.most, "at least 1"),
        )


@dataclass
class SkipOptions:
    """Which updates are left out, by the loss and the gradient norm of the whole step, and when a run has had enough of it."""

    non_finite: Literal["skip", "stop"] = "skip"
    """A loss or gradient norm that is not finite: ``skip`` leaves the update out, ``stop`` ends the run as well."""
    loss_deviations: float | None = None
    """Leave an update out whose loss is more than so many robust standard deviations (1.4826 times the median absolute deviation) above
    the median of the window; null: never."""
    grad_norm_deviations: float | None = None
    """The same of the gradient norm before clipping."""
    window: int = 128
    """Steps that were not skipped, the last ones, that a step is compared with. A new stage of the data begins a new window."""
    min_steps: int = 32
    """Steps that the window must have before anything counts as a spike."""
    most_consecutive: int | None = 20
    """Skipped steps in a row that stop the run; null: no number does."""
    rollback: RollbackOptions | None = None
    """Go back to the last checkpoint; null: never."""

    def __post_init__(self) -> None:
        ks = {"loss_deviations": self.loss_deviations, "grad_norm_deviations": self.grad_norm_deviations}
        most, rollback = self.most_consecutive, self.rollback
        before = rollback is None or most is None or rollback.skips <= most
        require(
            *((k is None or k > 0, name, k, "more than 0, or null") for name, k in ks.items()),
            (self.window >= 2, "window", self.window, "at least 2"),
            (2 <= self.min_steps <= self.window, "min_steps", self.min_steps, f"from 2 to window ({self.window})"),
            (most is None or most >= 1, "most_consecutive", most, "at least 1, or null"),
            (before, "most_consecutive", most, f"at least rollback.skips ({rollback and rollback.skips}), or null"),
        )
