"""Learning-rate factor as a function of the step, and of nothing else."""

import math

from megatron_ext.optim.options import ScheduleOptions


def learning_rate_factor(options: ScheduleOptions, step: int, total_steps: int) -> float:
    """Factor of the base learning rate for an optimizer step.

    A run is one period, or several where ``decay_ends`` says so: each ends with a decay, and the next begins with a linear rise from
    ``min_factor`` (re-warming and re-decaying, Ibrahim et al. 2024, arXiv:2403.08763; with wsd and no ``rewarm_steps``, WSD-S
    of Wen et al. 2024, arXiv:2410.05192). The first period begins with a linear warm-up from ``warmup_from`` to 1.

    Args:
        options: kind and lengths.
        step: number of the step, from 1 to ``total_steps``.
        total_steps: steps of the whole run.

    Returns:
        After the warm-up, by kind: ``constant``: 1; ``cosine``: half a cosine from 1 to ``min_factor`` at the last step of the period
        (Loshchilov and Hutter 2017, eq. 5); ``wsd``: 1, then a decay to ``min_factor`` over the last ``decay_steps`` (Hu et al. 2024, eq.
        1); ``infinite``: a fall to ``constant_factor`` over ``cooldown_steps``, that factor, then the decay (Ibrahim et al. 2024,
        whose decay is ``exponential``).
    """
    begin, end = options.period(step, total_steps)
    warmup, first = options.warmup(begin)
    done, length = step - begin, end - begin
    if done <= warmup:
        return first + (1.0 - first) * (done / warmup)
    if options.kind == "constant":
        return 1.0
    if options.kind == "cosine":
        return _fall("cosine", 1.0, options.min_factor, _progress(done, warmup, length))
    plateau = 1.0
    if options.kind == "infinite":
        progress = _progress(done, warmup, warmup + options.cooldown_steps)
        plateau = _fall(options.cooldown_shape, 1.0, options.constant_factor, progress, options.cooldown_steepness)
    return _fall(options.decay_shape, plateau, options.min_factor, _progress(done, length - options.decay_length(length), length))


def _progress(step: int, begin: int, end: int) -> float:
    """Share of the way from ``begin`` to ``end``; where that is no way at all, 0 up to it and 1 behind it."""
    if begin == end:
        return float(step > begin)
    return min(1.0, max(0.0, (step - begin) / (end - begin)))


def _fall(shape: str, top: float, bottom: float, progress: float, steepness: float = 0.0) -> float:
    """The value between ``top`` and ``bottom`` after ``progress`` (0 to 1) of the way down."""
    if shape == "exponential":
        return top * (bottom / top) ** progress
    if shape == "inverse":
        return 1.0 / (progress / bottom + (1.0 - progress) / top)
    return bottom + (top - bottom) * _remaining(shape, progress, steepness)


def _remaining(shape: str, progress: float, steepness: float) -> float:
    """Share of a fall that is still to come after ``progress`` (0 to 1) of its steps."""
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if shape == "one_minus_sqrt":
        return 1.0 - math.sqrt(progress)
    if shape == "inverse_sqrt":
        return 1.0 - _inverse_sqrt(steepness * progress) / _inverse_sqrt(steepness)
    return 1.0 - progress


def _inverse_sqrt(time: float) -> float:
    return 1.0 / math.sqrt(1.0 + time) - 1.0
