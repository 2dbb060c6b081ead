"""Which keys of a DeepSpeed configuration this package decides, and which the user may pass through."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megatron_ext.option_rules import OptionError, Problem, one_of, shown

_STEP = "set by data.tokens_per_step and planning.tokens_per_pack, which make the packs of a step"
_GRADIENTS = "decided here: gradients are summed in float32 and reduced to the ranks that own their master weights"
_ORDER = "set by data: sources, weights and order"
_LAYOUT = "set by parallel; what is left of the launcher's ranks is data parallel"

OWNED: Mapping[str, str] = MappingProxyType(
    {
        "train_batch_size": _STEP,
        "train_micro_batch_size_per_gpu": _STEP,
        "gradient_accumulation_steps": _STEP,
        "managed_gradient_accumulation": _STEP,
        "gradient_clipping": "set by optimizer.clip_norm",
        "optimizer": "set by optimizer",
        "scheduler": "set by schedule",
        "bf16": "set by train.dtype",
        "bfloat16": "set by train.dtype",
        "fp16": "set by train.dtype",
        "torch_autocast": "set by train.dtype",
        "data_types": "set by train.dtype",
        "zero_optimization": "set by optimizer.sharding",
        "zero_allow_untested_optimizer": "set by optimizer.sharding",
        "zero_force_ds_cpu_optimizer": "set by optimizer.sharding",
        "prescale_gradients": _GRADIENTS,
        "gradient_predivide_factor": _GRADIENTS,
        "gradient_allreduce_op": _GRADIENTS,
        "communication_data_type": _GRADIENTS,
        "disable_allgather": _GRADIENTS,
        "data_efficiency": _ORDER,
        "dataloader_drop_last": _ORDER,
        "pipeline": _LAYOUT,
        "tensor_parallel": _LAYOUT,
        "expert_parallel": _LAYOUT,
        "sequence_parallel_size": _LAYOUT,
        "seq_parallel_communication_data_type": _LAYOUT,
        "use_data_before_expert_parallelism": _LAYOUT,
        "activation_checkpointing": "set by train.activation_checkpointing",
        "checkpoint": "set by checkpoint",
        "datastates_ckpt": "set by checkpoint",
        "steps_per_print": "set by logging.every",
        "tensorboard": "set by logging.tensorboard",
        "vocabulary_size": "set by model.vocab_size",
    }
)
"""Key -> what decides it."""

PASSED_THROUGH = (
    "aio",
    "autotuning",
    "comet",
    "comms_logger",
    "compile",
    "csv_monitor",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "hybrid_engine",
    "log_level",
    "memory_breakdown",
    "timers",
    "wall_clock_breakdown",
    "wandb",
    "weight_quantization",
)
"""Keys that DeepSpeed 0.19 reads and nothing here decides. DeepSpeed ignores a key that it does not know, so a slip is caught here."""


MONITORS = ("tensorboard", "comet", "csv_monitor", "wandb")
"""Keys of sections that say where events are written."""


def check_deepspeed_section(section: dict[str, Any]) -> dict[str, Any]:
    """Return ``section`` as it is.

    Raises:
        OptionError: naming every key that is decided elsewhere or that DeepSpeed does not know.
    """
    problems = [_problem(key, value) for key, value in section.items() if key not in PASSED_THROUGH]
    if problems:
        raise OptionError(problems)
    return section


def _problem(key: str, value: Any) -> Problem:
    if key in OWNED:
        return Problem(key, shown(value), f"no value here, it is {OWNED[key]}")
    return Problem(key, f"no such key (its value: {shown(value)})", one_of(PASSED_THROUGH, key))
