"""Which steps are skipped, when a run goes back to a checkpoint because of them, and when it stops.

All decisions follow from the loss and the gradient norm over all ranks and from state that checkpoints save: they are the same on every
rank, after every restart and, up to rounding, on every grid.
"""

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_ext.config.skip_options import SkipOptions
from megatron_ext.errors import TrainingError

NORMAL = 1.4826
"""Standard deviation of a normal variable over its median absolute deviation."""
MOST_TOLD = 8
"""Steps that an error lists."""


def robust_limit(values: Iterable[float], deviations: float) -> float:
    """``deviations`` robust standard deviations above the median of ``values``; infinity where most of these are equal."""
    window = np.fromiter(values, dtype=np.float64)
    median = float(np.median(window))
    deviation = NORMAL * float(np.median(np.abs(window - median)))
    return median + deviations * deviation if deviation > 0 else math.inf


@dataclass(frozen=True)
class BadStep:
    """A step whose update was left out."""

    step: int
    reasons: list[str]
    """``non_finite``, ``loss_spike``, ``grad_norm_spike``."""
    loss: float
    grad_norm: float
    limits: dict[str, float] = field(default_factory=dict)
    """What spikes exceeded, by reason."""

    def __str__(self) -> str:
        limits = "".join(f", limit {limit:.4g}" for limit in self.limits.values())
        return f"step {self.step} ({' and '.join(self.reasons)}: loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g}{limits})"

    def state(self) -> list[Any]:
        """As JSON values. Numbers are words, because JSON has none that are not finite."""
        limits = {reason: repr(limit) for reason, limit in self.limits.items()}
        return [self.step, self.reasons, repr(self.loss), repr(self.grad_norm), limits]

    @classmethod
    def of_state(cls, state: list[Any]) -> "BadStep":
        """From ``state``."""
        step, reasons, loss, grad_norm, limits = state
        return cls(step, reasons, float(loss), float(grad_norm), {reason: float(limit) for reason, limit in limits.items()})


class StepGuard:
    """Judges every step before its update.

    Args:
        options: the rules.

    Attributes:
        bad: the last step, if it was skipped.
        skipped: steps that were skipped since the begin of the run. Those that a run went back behind do not count.
        by_reason: the same by reason; a step may have two.
        rollbacks: how often the run went back.
        row: skipped steps that follow each other, up to the last step.
    """

    def __init__(self, options: SkipOptions) -> None:
        self._options = options
        self.bad: BadStep | None = None
        self.skipped = self.rollbacks = self.row = 0
        self.by_reason: Counter[str] = Counter()
        self._recent: list[BadStep] = []
        self._window: deque[tuple[float, float]] = deque(maxlen=options.window)
        self._step, self._stage = 0, 0

    def begin_step(self, step: int, stage: int) -> None:
        """Step ``step`` is computed next, in the stage of the data that begins at ``stage`` tokens: another level, another window."""
        if stage != self._stage:
            self._window.clear()
        self._step, self._stage = step, stage

    def judge(self, loss: float, grad_norm: float) -> bool:
        """Whether the update of the step is taken; see ``Judge``."""
        limits = self._limits()
        values = {"loss_spike": loss, "grad_norm_spike": grad_norm}
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            reasons = ["non_finite"]
        else:
            reasons = [reason for reason, limit in limits.items() if values[reason] > limit]
        self.bad = None
        if not reasons:
            self._window.append((loss, grad_norm))
            self.row = 0
            return True
        self.bad = BadStep(self._step, reasons, loss, grad_norm, {reason: limits[reason] for reason in reasons if reason in limits})
        self.skipped += 1
        self.by_reason.update(reasons)
        self.row += 1
        self._recent = [bad for bad in self._recent if bad.step > self._step - self._span] + [self.bad]
        return False

    @property
    def goes_back(self) -> bool:
        """Enough steps were skipped, the last one among them, that the run is to go back to its last checkpoint."""
        rollback = self._options.rollback
        if rollback is None or self.bad is None:
            return False
        return sum(bad.step > self._step - rollback.span for bad in self._recent) >= rollback.skips

    def check(self, has_checkpoint: bool) -> None:
        """End the run if it has had enough. Without a checkpoint to go back to it can only skip.

        Raises:
            TrainingError: with the last skipped steps, their reasons and their numbers.
        """
        most, rollback = self._options.most_consecutive, self._options.rollback
        if self.bad is None:
            return
        if self._options.non_finite == "stop" and "non_finite" in self.bad.reasons:
            raise TrainingError(f"train.skip.non_finite is stop, and the update of {self.bad} was left out")
        if self.goes_back and rollback is not None and self.rollbacks >= rollback.most:
            raise TrainingError(f"went back {self.rollbacks} times (train.skip.rollback.most), and steps are skipped again: {self._told()}")
        if most is not None and self.row >= most and not (self.goes_back and has_checkpoint):
            raise TrainingError(f"skipped {self.row} steps in a row (train.skip.most_consecutive {most}): {self._told()}")

    def went_back(self, rollbacks: int) -> None:
        """The state is that of the checkpoint; the run has gone back ``rollbacks`` times, and counts skipped steps anew."""
        self.bad, self.rollbacks, self.row = None, rollbacks, 0
        self._recent.clear()

    def causes(self) -> list[dict[str, Any]]:
        """The skipped steps that make the run go back."""
        assert self._options.rollback is not None, "it goes back"
        looked_at = [bad for bad in self._recent if bad.step > self._step - self._options.rollback.span]
        return [{"step": bad.step, "reasons": bad.reasons, "loss": bad.loss, "grad_norm": bad.grad_norm} for bad in looked_at]

    def records(self) -> dict[str, Any]:
        """For the metrics of a step."""
        return {"skipped_steps": self.skipped, "skipped_by_reason": dict(self.by_reason), "rollbacks": self.rollbacks}

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON values."""
        return {
            "window": [list(each) for each in self._window],
            "stage": self._stage,
            "skipped": self.skipped,
            "by_reason": dict(self.by_reason),
            "rollbacks": self.rollbacks,
            "row": self.row,
            "recent": [bad.state() for bad in self._recent],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.bad = None
        self._window = deque(map(tuple, state["window"]), maxlen=self._options.window)
        self._stage = state["stage"]
        self.skipped, self.rollbacks, self.row = state["skipped"], state["rollbacks"], state["row"]
        self.by_reason = Counter(state["by_reason"])
        self._recent = [BadStep.of_state(each) for each in state["recent"]]

    def _limits(self) -> dict[str, float]:
        """What a spike exceeds, by reason, of the rules that are armed."""
        rules = {"loss_spike": (0, self._options.loss_deviations), "grad_norm_spike": (1, self._options.grad_norm_deviations)}
        if len(self._window) < self._options.min_steps:
            return {}
        return {reason: robust_limit((each[at] for each in self._window), k) for reason, (at, k) in rules.items() if k is not None}

    @property
    def _span(self) -> int:
        """Steps whose badness may still matter or be told."""
        return max(MOST_TOLD, self._options.rollback.span if self._options.rollback else 0)

    def _told(self) -> str:
        return "; ".join(map(str, self._recent[-MOST_TOLD:]))
