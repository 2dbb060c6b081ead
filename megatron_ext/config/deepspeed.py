"""The DeepSpeed configuration of a run, derived: nothing in it is written down twice."""

from pathlib import Path
from typing import Any

from megatron_ext.config.schema import RunConfig

_NEVER = 2**62


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """Return the dictionary for ``deepspeed.initialize`` on ``world_size`` data ranks.

    A micro-batch is one pack and the number of packs may differ every step, so DeepSpeed is told of one micro-batch a step and leaves
    accumulation, clipping and the update to us.
    """
    return {
        **config.deepspeed,
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 0},
        "steps_per_print": _NEVER,
        "tensorboard": {
            "enabled": config.logging.tensorboard,
            "output_path": str(Path(config.run_dir)),
            "job_name": "tensorboard",
        },
    }
