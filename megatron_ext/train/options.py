"""What a user can say about the run itself."""

from dataclasses import dataclass


@dataclass
class TrainOptions:
    """Length and numbers of a run."""

    steps: int | None = None
    """Optimizer steps of the run. Give either this or ``tokens``."""
    tokens: int | None = None
    """Token budget of the run, turned into steps by ``data.tokens_per_step``."""
    dtype: str = "auto"
    """Of parameters and activations: ``bfloat16``, ``float32``, ``float64``; ``auto``: bfloat16 where the device is fast at it."""
    activation_checkpointing: bool = False
    """Compute each block twice instead of keeping its activations."""
    threads_per_rank: int | None = None
    """CPU threads of a rank; null: the cores of the machine divided by its ranks."""


@dataclass
class EvaluationOptions:
    """Loss on the validation corpora."""

    every: int | None = None
    """Evaluate every this many steps; null: only before the first and after the last step."""
    tokens: int = 65536
    """Most tokens of each validation corpus."""


@dataclass
class LoggingOptions:
    """What a run prints and writes."""

    every: int = 10
    """Steps between console lines. metrics.jsonl has a line for every step."""
    tensorboard: bool = True
    """Write TensorBoard events through DeepSpeed's monitor."""
