"""What a user can say about the optimizer and the learning-rate schedule."""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.option_rules import require


@dataclass
class OptimizerOptions:
    """AdamW (Loshchilov and Hutter 2019) on float32 master weights, each rank owning a part of them."""

    lr: float = 3e-4
    """Base learning rate; the schedule multiplies it."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moments, each in [0, 1)."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and biases are not decayed."""
    clip_norm: float = 1.0
    """Largest global gradient norm before the update; 0 switches clipping off."""
    sharding: Literal["whole_tensor", "zero1", "zero2", "zero3"] = "whole_tensor"
    """``whole_tensor``: each rank owns some rows of the master weights and moments; ``zero1``, ``zero2`` (gradients too), ``zero3``
    (parameters too): DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054), for models that fit no other way."""
    overlap_reduction: bool = True
    """Send gradients to their owners while the rest of the last backward pass computes; on GPUs only where no packs are shared."""

    def __post_init__(self) -> None:
        require(
            (self.lr >= 0, "lr", self.lr, "at least 0"),
            (all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "two numbers, each at least 0 and less than 1"),
            (self.eps > 0, "eps", self.eps, "more than 0"),
            (self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0"),
            (self.clip_norm >= 0, "clip_norm", self.clip_norm, "at least 0; 0 switches clipping off"),
        )


@dataclass
class ScheduleOptions:
    """Learning-rate factor by optimizer step. Give ``*_steps``; the whole length is that of the run."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """``cosine``, ``wsd`` (warm-up, stable, decay) or ``constant``; each begins with a linear warm-up."""
    warmup_steps: int = 0
    """Steps of the linear warm-up from 0."""
    decay_steps: int | None = None
    """wsd: length of the final decay; null: a tenth of the run."""
    decay_shape: Literal["linear", "cosine", "one_minus_sqrt"] = "linear"
    """wsd: ``linear``, ``cosine`` or ``one_minus_sqrt``."""
    min_factor: float = 0.1
    """Factor at the end of the decay."""

    def __post_init__(self) -> None:
        require(
            (self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "at least 0"),
            (self.decay_steps is None or self.decay_steps >= 1, "decay_steps", self.decay_steps, "at least 1, or null"),
            (
                self.decay_steps is None or self.kind == "wsd",
                "decay_steps",
                self.decay_steps,
                f"null, because schedule {self.kind} has no decay of its own length; kind wsd has",
            ),
            (0 <= self.min_factor <= 1, "min_factor", self.min_factor, "between 0 and 1"),
        )
