"""What a run is: the options of every room in one object, and the rules between rooms."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_ext.checkpoint.options import CheckpointOptions
from megatron_ext.config.deepspeed_keys import check_deepspeed_section
from megatron_ext.data.options import DataOptions
from megatron_ext.model.options import ModelOptions
from megatron_ext.optim.options import OptimizerOptions, ScheduleOptions
from megatron_ext.option_rules import require
from megatron_ext.planning.options import PlanningOptions
from megatron_ext.train.options import EvaluationOptions, LoggingOptions, TrainOptions


class RunConfig(BaseModel):
    """One training run. Sections belong to the rooms of their names; unknown keys are refused at every depth."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    run_dir: str = Field(min_length=1)
    """Directory of everything that the run writes."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides the initial weights and the order of the data."""
    tokenizer: str | None = None
    """Directory of a Hugging Face tokenizer; null: that of ``model.init_from``."""
    model: ModelOptions = Field(default_factory=ModelOptions)
    data: DataOptions
    planning: PlanningOptions = Field(default_factory=PlanningOptions)
    optimizer: OptimizerOptions = Field(default_factory=OptimizerOptions)
    schedule: ScheduleOptions = Field(default_factory=ScheduleOptions)
    train: TrainOptions
    evaluation: EvaluationOptions = Field(default_factory=EvaluationOptions)
    logging: LoggingOptions = Field(default_factory=LoggingOptions)
    checkpoint: CheckpointOptions = Field(default_factory=CheckpointOptions)
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Keys of a DeepSpeed configuration that no section above decides, passed through as they are."""

    @model_validator(mode="after")
    def _check_between_rooms(self) -> Self:
        steps, schedule = total_steps(self), self.schedule
        wsd_decay = (schedule.decay_steps or 0) if schedule.kind == "wsd" else 0
        pack = self.planning.tokens_per_pack
        sequence = self.data.sequence_length
        named = self.tokenizer or self.model.init_from or self.model.vocab_size
        require(
            (pack is None or pack >= sequence, "planning.tokens_per_pack", pack, f"at least data.sequence_length ({sequence}), or null"),
            (schedule.warmup_steps <= steps, "schedule.warmup_steps", schedule.warmup_steps, f"at most the {steps} steps of the run"),
            (
                schedule.warmup_steps + wsd_decay <= max(steps, schedule.warmup_steps),
                "schedule.decay_steps",
                schedule.decay_steps,
                f"at most the {steps - schedule.warmup_steps} steps that follow the warm-up",
            ),
            (bool(named), "tokenizer", self.tokenizer, "a directory, or null with model.init_from or model.vocab_size set"),
        )
        check_deepspeed_section(self.deepspeed)
        return self


def total_steps(config: RunConfig) -> int:
    """Optimizer steps of the whole run: ``train.steps``, or the fewest whose ``data.tokens_per_step`` cover ``train.tokens``."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.tokens is not None, "TrainOptions accepts exactly one of steps and tokens"
    return -(-config.train.tokens // config.data.tokens_per_step)
