"""What a run is: the options of every room in one object, and the rules between rooms."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from megatron_ext.checkpoint.options import CheckpointOptions
from megatron_ext.config.deepspeed_keys import check_deepspeed_section
from megatron_ext.config.objective_options import DistillationOptions, LossWeightingOptions
from megatron_ext.config.run_options import EvaluationOptions, LoggingOptions, TrainOptions
from megatron_ext.data.options import DataOptions
from megatron_ext.model.options import ModelOptions
from megatron_ext.optim.options import OptimizerOptions, ScheduleOptions
from megatron_ext.option_rules import require
from megatron_ext.parallel.options import ParallelOptions
from megatron_ext.planning.options import PlanningOptions
from megatron_ext.precision.options import PrecisionOptions


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
    parallel: ParallelOptions = Field(default_factory=ParallelOptions)
    planning: PlanningOptions = Field(default_factory=PlanningOptions)
    precision: PrecisionOptions = Field(default_factory=PrecisionOptions)
    optimizer: OptimizerOptions = Field(default_factory=OptimizerOptions)
    schedule: ScheduleOptions = Field(default_factory=ScheduleOptions)
    distillation: DistillationOptions | None = None
    """A teacher beside the model; null: none."""
    loss_weighting: LossWeightingOptions | None = None
    """Weights of documents by their losses; null: none."""
    train: TrainOptions
    evaluation: EvaluationOptions = Field(default_factory=EvaluationOptions)
    logging: LoggingOptions = Field(default_factory=LoggingOptions)
    checkpoint: CheckpointOptions = Field(default_factory=CheckpointOptions)
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Keys of a DeepSpeed configuration that no section above decides, passed through as they are."""

    _check_deepspeed = field_validator("deepspeed")(check_deepspeed_section)

    @model_validator(mode="after")
    def _check_between_rooms(self) -> Self:
        steps, sequence = total_steps(self), self.data.longest_sequence
        pack, longest = self.planning.tokens_per_pack, self.model.max_position
        # Policies that choose degrees are checked when the ranks are known.
        shared_by = {"data_parallel": 1, "static": self.planning.degree}.get(self.planning.policy)
        least = -(-sequence // (shared_by or 1))
        holds = pack is None or shared_by is None or self.planning.split_long or pack >= least
        has_vocabulary = bool(self.tokenizer or self.model.init_from or self.model.vocab_size)
        sharding, grid = self.optimizer.sharding, self.parallel
        whole_model = sharding == "whole_tensor" or (grid.tp == 1 and grid.pp == 1)
        whole_piece = f"at least data.sequence_length ({sequence}), or null"
        require(
            (holds, "planning.tokens_per_pack", pack, f"at least {least}, so that a pack holds data.sequence_length ({sequence}), or null"),
            (longest is None or longest >= sequence, "model.max_position", longest, whole_piece),
            *((holds, f"schedule.{key}", seen, accepted) for holds, key, seen, accepted in self.schedule.rules_of_length(steps)),
            (whole_model, "optimizer.sharding", sharding, f"whole_tensor with tp {grid.tp} and pp {grid.pp}; ZeRO with both 1"),
            (
                sharding == "whole_tensor" or self.train.dtype != "float64",
                "train.dtype",
                self.train.dtype,
                "auto, bfloat16 or float32: DeepSpeed's ZeRO keeps float32 masters",
            ),
            (
                self.precision.recipe == "bf16" or self.train.dtype != "float64",
                "precision.recipe",
                self.precision.recipe,
                "bf16 with train.dtype float64, which is not quantized",
            ),
            (
                self.precision.recipe == "bf16" or self.train.mlp_tile_tokens is None,
                "train.mlp_tile_tokens",
                self.train.mlp_tile_tokens,
                f"null with precision.recipe {self.precision.recipe}, whose scales are of all tokens of a pack",
            ),
            (
                sharding == "whole_tensor" or not self.model.norm.keeps_statistics,
                "model.norm.kind",
                self.model.norm.kind,
                f"a kind without statistics of tokens with optimizer.sharding {sharding}: only whole_tensor updates them",
            ),
            (
                self.distillation is None or sharding != "zero3",
                "optimizer.sharding",
                sharding,
                "another with distillation, which reads the output matrix that zero3 divides",
            ),
            (
                self.logging.profile is None or self.logging.profile.steps[1] <= steps,
                "logging.profile.steps",
                self.logging.profile and self.logging.profile.steps,
                f"steps of the run, which has {steps}",
            ),
            (
                sharding == "whole_tensor" or self.logging.digests_every is None,
                "logging.digests_every",
                self.logging.digests_every,
                f"null with optimizer.sharding {sharding}: DeepSpeed's ZeRO keeps no gradients to be read",
            ),
            (has_vocabulary, "tokenizer", self.tokenizer, "a directory; null with model.init_from or model.vocab_size"),
        )
        return self


def total_steps(config: RunConfig) -> int:
    """Optimizer steps of the whole run: ``train.steps``, or the fewest whose ``data.tokens_per_step`` cover ``train.tokens``."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.tokens is not None, "TrainOptions accepts exactly one of steps and tokens"
    return -(-config.train.tokens // config.data.tokens_per_step)
