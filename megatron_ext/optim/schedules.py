"""Learning-rate factor as a function of the step, and of nothing else."""

import math

from megatron_ext.optim.options import ScheduleOptions


def learning_rate_factor(options: ScheduleOptions, step: int, total_steps: int) -> float:
    """Factor of the base learning rate for an optimizer step.

    Args:
        options: kind and lengths.
        step: number of the step, from 1 to ``total_steps``.
        total_steps: steps of the whole run.

    Returns:
        ``step / warmup_steps`` during the warm-up, then by kind: ``constant``: 1; ``cosine``: half a cosine from 1 to ``min_factor`` at the
        last step (Loshchilov and Hutter 2017, eq. 5); ``wsd``: 1, then a decay to ``min_factor`` over the last ``decay_steps``
        (Hu et al. 2024, eq. 1).
    """
    if step <= options.warmup_steps:
        return step / options.warmup_steps
    if options.kind == "constant":
        return 1.0
    if options.kind == "cosine":
        begin, shape = options.warmup_steps, "cosine"
    else:
        decay_steps = options.decay_steps if options.decay_steps is not None else max(1, total_steps // 10)
        begin, shape = total_steps - decay_steps, options.decay_shape
    progress = min(1.0, max(0.0, (step - begin) / max(1, total_steps - begin)))
    return options.min_factor + (1.0 - options.min_factor) * _remaining(shape, progress)


def _remaining(shape: str, progress: float) -> float:
    """Share of the decay that is still to come after ``progress`` (0 to 1) of it."""
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if shape == "one_minus_sqrt":
        return 1.0 - math.sqrt(progress)
    return 1.0 - progress
