"""Which keys of a DeepSpeed configuration are ours and which the user may pass through."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megatron_ext.option_rules import OptionError, Problem

OWNED: Mapping[str, str] = MappingProxyType(
    {
        "train_batch_size": "set by data.tokens_per_step",
        "train_micro_batch_size_per_gpu": "set by planning.tokens_per_pack",
        "gradient_accumulation_steps": "set by data.tokens_per_step and planning.tokens_per_pack",
        "managed_gradient_accumulation": "set by the plan of each step (data.tokens_per_step)",
        "gradient_clipping": "set by optimizer.clip_norm",
        "optimizer": "set by optimizer",
        "scheduler": "set by schedule",
        "bf16": "set by train.dtype",
        "fp16": "set by train.dtype",
        "steps_per_print": "set by logging.every",
        "tensorboard": "set by logging.tensorboard",
        "activation_checkpointing": "set by train.activation_checkpointing",
        "checkpoint": "set by checkpoint",
        "zero_optimization": "decided by optimizer: every rank owns a part of the master weights and moments",
    }
)
"""Key -> who decides it."""


def check_deepspeed_section(section: Mapping[str, Any]) -> None:
    """Raise OptionError for every key of ``section`` that is ours."""
    problems = [Problem(f"deepspeed.{key}", value, f"not here, it is {OWNED[key]}") for key, value in section.items() if key in OWNED]
    if problems:
        raise OptionError(problems)
