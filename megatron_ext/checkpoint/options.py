"""What a user can say about checkpoints."""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.option_rules import require


@dataclass
class CheckpointOptions:
    """When to save, what to keep, where to resume from."""

    every: int | None = None
    """Save every this many steps; null: only at the end and when stopped."""
    keep_last: int = 2
    """Number of newest checkpoints to keep."""
    keep_every: int | None = None
    """Checkpoints of steps that this number divides are kept for good; null: none is."""
    asynchronous: bool | None = None
    """``true``: training goes on while a thread of each rank writes a copy of its part, which takes as much memory of the host as the rank
    saves. ``false``: training waits. null: ``true`` on an accelerator; ``false`` on the CPU, whose cores and memory training needs."""
    on_failure: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written, because the disk is full for example: ``stop`` the run, or ``continue`` until the next one. The
    last save of a run must succeed, and so must the check that weights are finite."""
    resume: str = "auto"
    """``auto``: from the latest checkpoint in the run directory if there is one; ``never``; or a checkpoint directory."""
    branch_from: str | None = None
    """A checkpoint of another run, to begin from with its weights, optimizer state, step and place in the data; the schedule is this
    run's. Only until the run has a checkpoint of its own. null: begin at step 0."""
    allow_changed_data: bool = False
    """Resume although the training data are not those of the checkpoint."""
    max_shard_gib: float = 4.0
    """Largest size of one safetensors file of the exported model."""

    def __post_init__(self) -> None:
        require(
            (self.every is None or self.every >= 1, "every", self.every, "a number of steps, at least 1, or null"),
            (self.keep_last >= 1, "keep_last", self.keep_last, "at least 1"),
            (self.keep_every is None or self.keep_every >= 1, "keep_every", self.keep_every, "a number of steps, at least 1, or null"),
            (bool(self.resume), "resume", self.resume, "auto, never or a checkpoint directory"),
            (self.branch_from != "", "branch_from", self.branch_from, "a checkpoint directory, or null"),
            (
                self.branch_from is None or self.resume == "auto",
                "branch_from",
                self.branch_from,
                f"null with resume {self.resume}, which says where to begin; or resume auto",
            ),
            (self.max_shard_gib > 0, "max_shard_gib", self.max_shard_gib, "GiB, more than 0"),
        )
