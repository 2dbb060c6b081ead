"""What a user can say about the optimizer and the learning-rate schedule."""

from dataclasses import dataclass


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


@dataclass
class ScheduleOptions:
    """Learning-rate factor by optimizer step. Give ``*_steps``; the whole length is that of the run."""

    kind: str = "cosine"
    """``cosine``, ``wsd`` (warm-up, stable, decay) or ``constant``; each begins with a linear warm-up."""
    warmup_steps: int = 0
    """Steps of the linear warm-up from 0."""
    decay_steps: int | None = None
    """wsd: length of the final decay; null: a tenth of the run."""
    decay_shape: str = "linear"
    """wsd: ``linear``, ``cosine`` or ``one_minus_sqrt``."""
    min_factor: float = 0.1
    """Factor at the end of the decay."""
