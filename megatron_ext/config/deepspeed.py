"""The DeepSpeed configuration of a run, derived: nothing in it is written down twice."""

from pathlib import Path
from typing import Any

from megatron_ext.config.deepspeed_keys import MONITORS
from megatron_ext.config.schema import RunConfig

_NEVER = 2**62


def deepspeed_config(config: RunConfig, data_ranks: int) -> dict[str, Any]:
    """Return the dictionary for ``deepspeed.initialize`` with ``data_ranks`` data-parallel ranks.

    A micro-batch is one pack and the number of packs may differ every step, so DeepSpeed is told of one micro-batch a step and leaves
    accumulation, clipping and the update to us. Monitors are left to ``monitor_config``: the pipeline engine would write events of its own.
    """
    return {
        **{key: value for key, value in config.deepspeed.items() if key not in MONITORS},
        "train_batch_size": data_ranks,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # The pipeline engine knows its boundaries and refuses to be told.
        "managed_gradient_accumulation": config.parallel.pp > 1,
        # Its division of what travels between stages keeps the sizes of the first pack.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 0},
        "steps_per_print": _NEVER,
    }


def monitor_config(config: RunConfig) -> dict[str, Any]:
    """The sections of a DeepSpeed configuration that say where events are written."""
    tensorboard = {"enabled": config.logging.tensorboard, "output_path": str(Path(config.run_dir)), "job_name": "tensorboard"}
    return {**{key: value for key, value in config.deepspeed.items() if key in MONITORS}, "tensorboard": tensorboard}
