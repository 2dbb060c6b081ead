"""Update rules, which rank owns which parameter, and learning-rate schedules."""

from megatron_ext.optim.adamw import AdamW

__all__ = ["AdamW"]
