"""AdamW under DeepSpeed's ZeRO stages 1 to 3, for runs that must divide gradients or parameters over the data ranks.

Read from deepspeed 0.19.8, beyond what ``passes`` says:

- Gradients are averaged over the ranks, so that losses are multiplied by their number here.
- Stages 2 and 3 reduce in every backward, so that all ranks must run equally many.
- The client's optimizer is left with one flat tensor for each parameter group (in stage 3 those of ``fp32_partitioned_groups_flat``),
  without state before its first step, and stages 1 and 2 show the state of a parameter only after
  ``lazy_init_hp_params_optimizer_state``, which they call when the first group has been updated and the others have no state yet. So both
  are done here at once.
- A step whose gradient norm is not finite is left out, its gradients forgotten. So the gate stands where the norm is taken, and makes
  infinite what it refuses: ``_get_norm_groups`` in stage 3, ``scaled_global_norm`` in stages 1 and 2, and ``get_grads_for_norm`` in stage 1
  with bfloat16, which is an optimizer of its own (``BF16_Optimizer``). Stage 2 with bfloat16 looks for values that are not finite before,
  and then asks for no norm.
- Stage 3 gathers a parameter when the module that holds it is called, unless a module around it is marked as a leaf. Tiles take the weights
  of linears as arguments before they call them, and so a tiled MLP is one.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    set_z3_leaf_module,
)
from torch import Tensor

from megatron_ext.errors import CheckpointError
from megatron_ext.model.gpt import GPT, parameter_shapes
from megatron_ext.model.mlp import MLP
from megatron_ext.optim.adamw import AdamW, decay_groups
from megatron_ext.optim.options import OptimizerOptions
from megatron_ext.optim.ownership import OwnedBox
from megatron_ext.optim.replicas import check_replicas
from megatron_ext.optim.state_change import StateChange
from megatron_ext.parallel.grid import Grid
from megatron_ext.parallel.placement import Placement, whole_box
from megatron_ext.train.deepspeed_setup import join_deepspeed, silenced
from megatron_ext.train.distillation import Distillation
from megatron_ext.train.losses import LossSums
from megatron_ext.train.packs import Packs
from megatron_ext.train.passes import WholePasses

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
MOMENTS = ("exp_avg", "exp_avg_sq")


def zero_config(deepspeed_config: dict[str, Any], options: OptimizerOptions, dtype: torch.dtype) -> dict[str, Any]:
    """The configuration of an engine that takes ``deepspeed_config``, with the stage of ``options`` instead of the owner optimizer."""
    return {
        **deepspeed_config,
        "zero_optimization": {"stage": STAGES[options.sharding], "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": options.clip_norm,
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }


def partitioned(make: Callable[[], GPT], grid: Grid, dtype: torch.dtype) -> GPT:
    """The model that ``make`` makes, each parameter divided over the data ranks as soon as it exists (stage 3)."""
    join_deepspeed(grid.world)
    bf16 = {"enabled": dtype == torch.bfloat16}
    config = {"train_batch_size": grid.shape.dp, "zero_optimization": {"stage": 3}, "bf16": bf16}
    # Its own argument ``dtype`` is only looked at where the accelerator has float16; elsewhere it makes everything bfloat16.
    with silenced(), deepspeed.zero.Init(config_dict_or_path=config):
        return make()


@torch.no_grad()
def set_weights(model: GPT, values: Iterable[tuple[str, Tensor]]) -> None:
    """Copy whole tensors into the parameters of a divided model, one at a time. All ranks pass the same."""
    parameters = dict(model.named_parameters())
    for name, value in values:
        with deepspeed.zero.GatheredParameters([parameters[name]], modifier_rank=0):
            parameters[name].copy_(value)


class ZeroOptimizer:
    """What the trainer and checkpoints ask of an optimizer, answered by DeepSpeed's. Attributes as of ``ShardedOptimizer``."""

    def __init__(self, model: GPT, rule: AdamW, engine: deepspeed.DeepSpeedEngine, grid: Grid) -> None:
        self._parameters = dict(model.named_parameters())
        self._rule, self._engine, self._grid = rule, engine, grid
        self.placements = {
            name: Placement(shape, whole_box(shape), (grid.world.rank,), False) for name, shape in parameter_shapes(model.config).items()
        }
        self.updates = 0
        self.gate: Callable[[float], bool] = math.isfinite
        self.grad_norm = 0.0
        self._taken: bool | None = None
        self._put_gate(engine.optimizer)

    def _put_gate(self, inner: Any) -> None:
        """Between the gradient norm and the update of DeepSpeed's optimizer."""
        if self._engine.zero_optimization_stage() == 3:
            take_groups = inner._get_norm_groups
            inner._get_norm_groups = lambda: self._passed(groups := take_groups(), combine_grad_norm_groups(groups))
        elif hasattr(inner, "scaled_global_norm"):
            take_norm = inner.scaled_global_norm
            inner.scaled_global_norm = lambda: self._passed([norm := take_norm()], norm)[0]
        else:
            take_gradients = inner.get_grads_for_norm

            def gradients(for_clipping: bool = False) -> Any:
                seen = take_gradients(for_clipping)
                if for_clipping:
                    return seen
                return self._passed(seen[0], get_global_norm_of_tensors(seen[0], mpu=inner.mpu)), seen[1]

            inner.get_grads_for_norm = gradients

    def _passed(self, values: list[Tensor], norm: Tensor) -> list[Tensor]:
        """``values``, whose norm is ``norm``, if the gate takes it; else one value that is infinite."""
        return values if self._asked(norm) else [torch.full_like(norm, math.inf)]

    def _asked(self, norm: Tensor) -> bool:
        """Ask the gate with the largest norm of any rank: they are equal. DeepSpeed's norm of what is not finite may be negative."""
        mine = norm.detach().double().reshape(1)
        mine = torch.where(mine.isfinite() & (mine >= 0), mine, math.inf)
        self.grad_norm = float(self._grid.world.max(mine))
        self._taken = self.gate(self.grad_norm)
        return self._taken

    def end_step(self) -> None:
        """Ask the gate if DeepSpeed had refused the step before there was a norm; what it says is what was done."""
        if self._taken is None:
            assert self.overflow, "an update goes through the gate"
            self._asked(torch.tensor(math.inf, device=self._grid.world.device))
        assert self.overflow is not self._taken, "DeepSpeed does what the gate says"
        self.updates += not self.overflow

    @property
    def overflow(self) -> bool:
        """See ``ShardedOptimizer``."""
        return not self._engine.was_step_applied()

    def expect_backwards(self, count: int) -> None:
        """A step begins. DeepSpeed counts for itself."""
        self._taken = None

    orthogonalizations = 0

    def records(self) -> dict[str, Any]:
        """See ``ShardedOptimizer``."""
        return {}

    def gradient_squares(self) -> None:
        """See ``ShardedOptimizer``: DeepSpeed keeps the norm of all gradients together only."""

    def set_learning_rate_factor(self, factor: float) -> None:
        """Learning rate of the next step, relative to the base rate."""
        for group in self._rule.param_groups:
            group["lr"] = self._rule.defaults["lr"] * factor

    def check_replicas(self) -> None:
        """See ``ShardedOptimizer``; in stage 3 no two ranks hold the same."""
        if self._engine.zero_optimization_stage() < 3:
            check_replicas(self._parameters, self.placements, self._grid)

    def owned_state(self) -> Iterator[tuple[OwnedBox, dict[str, Tensor]]]:
        """Whole parameters in turn, put together on all ranks, each to be saved by one of them. All ranks must go through all."""
        ranks = self._grid.dp
        step = next(iter(self._rule.state.values()))["step"]
        for number, (name, parameter) in enumerate(self._parameters.items()):
            values = {"master": safe_get_full_fp32_param(parameter)}
            values |= {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
            if number % ranks.size == ranks.rank:
                shape = self.placements[name].shape
                whole = {kind: value.view(shape).float() for kind, value in values.items()}
                yield OwnedBox(name, whole_box(shape), ranks.rank), whole | {"step": step}

    @torch.no_grad()
    def load_owned_state(self, read: Callable[[OwnedBox], dict[str, Tensor]]) -> list[StateChange]:
        """Replace every parameter by what ``read`` returns for it, on all ranks, one at a time.

        Raises:
            CheckpointError: a parameter has no moments of AdamW. DeepSpeed has one number of steps for all, so none could begin alone.
        """
        for name, parameter in self._parameters.items():
            values = read(OwnedBox(name, self.placements[name].box, self._grid.dp.rank))
            if missing := {*MOMENTS, "step"} - values.keys():
                raise CheckpointError(
                    f"{name}: the checkpoint has no {', '.join(sorted(missing))}, because another rule than adamw updated it; "
                    "accepted by ZeRO is the state of adamw alone. optimizer.sharding whole_tensor can begin anew where it is missing"
                )
            safe_set_full_fp32_param(parameter, values["master"])
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, values[moment], moment)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(values["master"])
            step = values["step"]
        for state in self._rule.state.values():
            state["step"].copy_(step)
        return []


class ZeroPasses(WholePasses):
    """See ``Passes``. Arguments as of ``zero_engine``, with the options of the optimizer, which DeepSpeed makes its own of."""

    in_rounds = True

    def __init__(
        self,
        model: GPT,
        options: OptimizerOptions,
        grid: Grid,
        deepspeed_config: dict[str, Any],
        distillation: Distillation | None = None,
    ) -> None:
        join_deepspeed(grid.world)
        groups = decay_groups(model.named_parameters(), options.weight_decay, parameter_shapes(model.config))
        members = [list(group["params"]) for group in groups]
        rule = AdamW(groups, lr=options.lr, betas=tuple(options.betas), eps=options.eps)
        config = zero_config(deepspeed_config, options, next(model.parameters()).dtype)
        for module in model.modules():
            if isinstance(module, MLP) and module.tile is not None:
                set_z3_leaf_module(module, True)
        with silenced():
            self._engine, *_ = deepspeed.initialize(model=model, optimizer=rule, config=config, dist_init_required=False)
        _begin_state(rule, members, self._engine)
        self._grid, self._device, self._distillation = grid, grid.world.device, distillation
        self._parameters = dict(model.named_parameters())
        self.optimizer = ZeroOptimizer(model, rule, self._engine, grid)

    def train(self, packs: Packs, denominator: float, losses: LossSums) -> None:
        """See ``Passes``."""
        super().train(packs, denominator / self._grid.shape.dp, losses)
        self.optimizer.end_step()

    @torch.no_grad()
    def weight(self, name: str) -> Tensor:
        """See ``Passes``. In stage 3 the ranks put it together."""
        parameter = self._parameters[name]
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone() if self._engine.zero_optimization_stage() == 3 else parameter.detach()


def _begin_state(rule: AdamW, members: list[list[torch.nn.Parameter]], engine: deepspeed.DeepSpeedEngine) -> None:
    """Give AdamW the state that it would make in its first step, and let DeepSpeed find each parameter's part of it."""
    stage = engine.zero_optimization_stage()
    flats = [flat for group in rule.param_groups for flat in group["params"]]
    for flat in engine.optimizer.fp32_partitioned_groups_flat if stage == 3 else flats:
        rule.state[flat] = {"step": torch.zeros((), device=flat.device), **{moment: torch.zeros_like(flat) for moment in MOMENTS}}
    if stage < 3:
        for group, parameters in zip(rule.param_groups, members, strict=True):
            lazy_init_hp_params_optimizer_state(parameters, group["params"][0], rule.state)
