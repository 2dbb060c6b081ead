"""Update rules on the ranks that own what they update: gradients go to owners, owners update in float32, new values go back to everyone.

Memory as in ZeRO-1 (Rajbhandari et al. 2020, section 5.1), but what a rank owns is a list of named row blocks or matrices and not a slice
of one flat buffer, so that rules and checkpoints see tensors by name.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_ext.errors import CheckpointError
from megatron_ext.optim.extension import Constraint, UpdateExtension
from megatron_ext.optim.extensions import Extensions
from megatron_ext.optim.main_gradients import main_dtype
from megatron_ext.optim.matrix_exchange import MatrixExchange
from megatron_ext.optim.ownership import OwnedBox, assign, buckets, local
from megatron_ext.optim.reduction import GradientReduction, flatten, unflatten
from megatron_ext.optim.replicas import check_replicas
from megatron_ext.optim.rules import Rule
from megatron_ext.optim.state_change import StateChange
from megatron_ext.parallel.grid import Grid
from megatron_ext.parallel.placement import Placement

BUCKET_BYTES = 16 * 2**20


@dataclass
class MasterPart:
    """What this rank updates of a parameter. ``master`` shares memory with the parameter where that is float32 or float64 itself."""

    part: OwnedBox
    parameter: torch.Tensor | None
    """The part in this rank's parameter; None for a matrix that is put together here from the parts of several ranks."""
    master: torch.nn.Parameter


class ShardedOptimizer(torch.optim.Optimizer):
    """Reduce gradients to their owners, clip by the norm of the whole model, update, send the new values to all ranks.

    A step with dp data ranks, B bytes of main gradients and b bytes of parameters sends (B + b) (dp - 1) / dp a rank in the mean; what n
    ranks of the model hold alike (norms, tied embeddings) adds an all-reduce of each owner's part among them, 2 (n - 1) / n of its bytes,
    after which they apply equal updates and stay equal to the bit; ``MatrixExchange`` says what matrices cost that a rule needs whole.

    Args:
        parameters: of this rank, by name, in the order of the model; tied ones once.
        placements: of the parameters.
        rules: the update rule of each parameter.
        grid: the ranks.
        clip_norm: largest global gradient norm; 0: no clipping.
        overlap: send gradients while the last backward pass still computes others.
        extensions: change gradients before the rule and updates after it, in this order.
        constraint: changes parameters after every update.

    Attributes:
        owned: what this rank updates.
        rules: the rules of that, by name.
        grad_norm: global norm of the last step, before clipping.
        gate: asked on every rank, with the gradient norm of a step, whether the update is taken; all answers are equal. By default: if
            the norm is finite.
        overflow: True if the last update was left out; DeepSpeed's word for it.
        updates: steps that were not skipped.
        observe: is shown the gradients of the step, over all ranks each part once, before anything changes them; None: nobody looks.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        placements: Mapping[str, Placement],
        rules: Mapping[str, Rule],
        grid: Grid,
        clip_norm: float,
        overlap: bool = True,
        extensions: Sequence[UpdateExtension] = (),
        constraint: Constraint | None = None,
    ) -> None:
        self._parameters = dict(parameters)
        super().__init__([{"params": list(self._parameters.values()), "lr": 0.0}], {})
        self.placements = placements
        self._grid = grid
        self._clip_norm = clip_norm
        self._extensions = Extensions(extensions)
        self._constraint = constraint
        whole = self._extensions.need_whole
        self._rule_of = {name: replace(rule, share="part") if whole and rule.share == "rows" else rule for name, rule in rules.items()}
        parts = assign(placements, self._rule_of, grid.dp.size, grid.tp.size)
        dtypes = {name: main_dtype(parameter.dtype) for name, parameter in self._parameters.items()}
        self._buckets = buckets(parts, dtypes, BUCKET_BYTES)
        self._reduction = GradientReduction(self._buckets, self._parameters, placements, grid.dp, overlap)
        self.gradients = self._reduction.gradients
        self._reduced: dict[OwnedBox, torch.Tensor] = {}
        self._norms: tuple[list[str], torch.Tensor] = [], torch.zeros(0)
        mine = [part for part in parts if part.owner == grid.dp.rank]
        shapes = {name: placement.shape for name, placement in placements.items()}
        self._exchange = MatrixExchange([part for part in mine if part.meets_on is not None], shapes, grid.tp, grid.world.device)
        self.owned = [self._master_part(part) for part in mine if part.meets_on is None] + self._met_masters()
        self.rules = self._make_rules()
        for owned in self.owned:
            self._extensions.begin(owned.part, owned.master, {})
        self.gate: Callable[[float], bool] = math.isfinite
        self.grad_norm = 0.0
        self.overflow = False
        self.updates = 0
        self.observe: Callable[[list[tuple[OwnedBox, torch.Tensor]]], None] | None = None

    def expect_backwards(self, count: int) -> None:
        """A step begins, in which this rank runs ``count`` backward passes."""
        self._reduction.begin(count)

    def set_learning_rate_factor(self, factor: float) -> None:
        """Learning rates of the next step, relative to the base rate of each rule."""
        for group in (group for rule in self.rules.values() for group in rule.param_groups):
            group["lr"] = group["base_lr"] * factor

    @property
    def orthogonalizations(self) -> int:
        """Matrices that the rules of this rank orthogonalized in the last step."""
        return sum(getattr(rule, "orthogonalizations", 0) for rule in self.rules.values())

    def gradient_squares(self) -> dict[str, float]:
        """Squares of the gradients of the last step before clipping, summed by parameter over the parts that count on this rank.

        Over all ranks each part counts once, so that all of them add up to the square of ``grad_norm``.
        """
        squares: dict[str, float] = {}
        for name, norm in zip(self._norms[0], self._norms[1].tolist(), strict=True):
            squares[name] = squares.get(name, 0.0) + norm * norm
        return squares

    def records(self) -> dict[str, Any]:
        """What the metrics say about the last step beside the attributes, on every rank."""
        return {} if self._constraint is None else self._constraint.records()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update from the gradients accumulated since the last; left out on every rank if the gate refuses their global norm."""
        self._reduced = dict(self._reduction.finish())
        self._sum_replicas()
        if self.observe is not None:
            self.observe(self._counted())
        self._extensions.prepare(self.updates + 1)
        for part, gradient in self._reduced.items() if self._extensions else ():
            self._extensions.change_gradient(part, gradient)
        if self._constraint is not None:
            self._constraint.prepare()
        self.grad_norm = self._global_norm()
        self.overflow = not self.gate(self.grad_norm)
        if not self.overflow:
            self._update()
            self.updates += 1
        self.zero_grad()

    def check_replicas(self) -> None:
        """Compare the parameters of all ranks that must hold the same; raises ReplicaError on all ranks if they do not."""
        check_replicas(self._parameters, self.placements, self._grid)

    def owned_state(self) -> Iterator[tuple[OwnedBox, dict[str, torch.Tensor]]]:
        """What this rank is to save: ``master`` and the rule's state of its parts, by kind. Over all ranks, each part of the model once."""
        for owned in self.owned:
            if self._is_saved(owned):
                yield owned.part, {"master": owned.master.detach(), **self._state(owned), **self._extensions.state(owned.part)}

    @torch.no_grad()
    def load_owned_state(self, read: Callable[[OwnedBox], dict[str, torch.Tensor]]) -> list[StateChange]:
        """Replace this rank's parts by what ``read`` returns for them, then every rank's parameters by the new values.

        Returns:
            What state could not be kept, because another rule made it.

        Raises:
            CheckpointError: a tensor has another shape than the part it is read for.
        """
        changes = []
        for owned in self.owned:
            values = read(owned.part)
            for kind, value in values.items():
                if value.shape != owned.master.shape[: value.ndim]:
                    seen, accepted = list(value.shape), list(owned.master.shape)
                    raise CheckpointError(f"{owned.part.name} ({kind}): the part in the checkpoint is {seen}, in the model {accepted}")
            owned.master.copy_(values.pop("master"))
            begun = self._extensions.begin(owned.part, owned.master, values)
            rule = self._rule_of[owned.part.name]
            kept = rule.kept(values)
            device = owned.master.device
            # A part of a wider tensor may come with its strides, which torch's fused AdamW would not look at.
            state = {kind: value.to(device, main_dtype(value.dtype)).contiguous() for kind, value in values.items() if kind in kept}
            self.rules[rule.name].state[owned.master] = state
            if self._is_saved(owned):
                changes += [*StateChange.between(owned.part.name, rule, values.keys()), *begun]
        self.publish()
        return changes

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the accumulated gradients."""
        self._reduction.clear()
        self._reduced.clear()
        for owned in self.owned:
            owned.master.grad = None

    def _sum_replicas(self) -> None:
        """Give all holders of a part the sum of their gradients, or the mean where each has the whole: the same bits to all."""
        for replicas in sorted({p.replicas for p in self.placements.values() if len(p.replicas) > 1}):
            shared = [part for part in self._reduced if self.placements[part.name].replicas == replicas]
            gradients = [self._reduced[part] for part in shared]
            if not shared:
                continue
            for part, gradient in zip(shared, gradients, strict=True):
                if not self.placements[part.name].partial:
                    gradient.mul_(1.0 / len(replicas))
            flat = self._grid.group("replicas", replicas).all_reduce(torch.cat([gradient.reshape(-1) for gradient in gradients]))
            for gradient, total in zip(gradients, unflatten(flat, [gradient.shape for gradient in gradients]), strict=True):
                gradient.copy_(total)

    def _counted(self) -> list[tuple[OwnedBox, torch.Tensor]]:
        """Gradients of this rank's parts; over all ranks, those of each part once."""
        return [each for each in self._reduced.items() if self.placements[each[0].name].replicas[0] == self._grid.world.rank]

    def _global_norm(self) -> float:
        """Norm of the whole model's gradient; of replicas, the first one counts."""
        counting = self._counted()
        norms = torch.zeros(0, dtype=torch.float64)
        if counting:
            norms = torch.stack(torch._foreach_norm([gradient for _, gradient in counting])).double()
        self._norms = [part.name for part, _ in counting], norms
        return math.sqrt(float(self._grid.world.sum(norms.square().sum())))

    def _update(self) -> None:
        scale = self._clip_norm / (self.grad_norm + 1e-6) if self._clip_norm > 0 else 1.0
        if scale < 1.0 and self._reduced:
            torch._foreach_mul_(list(self._reduced.values()), scale)
        self._hand_gradients_over()
        extended = self.owned if self._extensions else []
        for owned in extended:
            self._extensions.before_update(owned.part, owned.master, self._state(owned))
        for rule in self.rules.values():
            rule.step()
        changed = [owned for owned in self.owned if not self._extensions.is_frozen(owned.part)]
        for owned in changed if self._extensions else ():
            self._extensions.after_update(owned.part, owned.master)
        for owned in changed if self._constraint is not None else ():
            self._constraint.apply(owned.part, owned.master)
        for owned in extended:
            self._extensions.restore(owned.part, owned.master, self._state(owned))
        self.publish()

    def _hand_gradients_over(self) -> None:
        """To the masters, those of divided matrices put together."""
        for owned in self.owned:
            if owned.parameter is not None:
                owned.master.grad = self._reduced.pop(owned.part)
        if self._exchange.parts:
            wholes = self._exchange.gather([self._reduced.pop(part) for part in self._exchange.parts])
            for owned, gradient in zip(self._met, wholes, strict=True):
                owned.master.grad = gradient

    @torch.no_grad()
    def publish(self) -> None:
        """Write the master parts of every owner, rounded to the parameters' dtype, into the parameters of all data ranks."""
        for owned in self.owned:
            if owned.parameter is not None and owned.parameter.data_ptr() != owned.master.data_ptr():
                owned.parameter.copy_(owned.master)
        if self._exchange.parts:
            targets = [self._in_parameter(part) for part in self._exchange.parts]
            values = self._exchange.scatter([owned.master.detach() for owned in self._met], targets[0])
            for target, new in zip(targets, values, strict=True):
                target.copy_(new)
        self._broadcast()

    def _broadcast(self) -> None:
        """From the owner of each part to all data ranks."""
        group = self._grid.dp
        if group.size == 1:
            return
        pending = []
        for bucket in self._buckets:
            targets = [self._in_parameter(part) for part in bucket]
            flat = flatten(targets)
            pending.append((bucket[0].owner, targets, flat, group.start_broadcast(flat, bucket[0].owner)))
        for owner, targets, flat, work in pending:
            if work is not None:
                work.wait()
            if owner != group.rank and flat.data_ptr() != targets[0].data_ptr():
                for target, values in zip(targets, unflatten(flat, [target.shape for target in targets]), strict=True):
                    target.copy_(values)

    def _in_parameter(self, part: OwnedBox) -> torch.Tensor:
        return local(part, self.placements[part.name], self._parameters[part.name].detach())

    def _is_saved(self, owned: MasterPart) -> bool:
        """No other rank of the model that updates the same part comes before this one."""
        first = self.placements[owned.part.name].replicas[0]
        return first == self._grid.world.rank if owned.parameter is not None else first in self._grid.tp.ranks

    def _state(self, owned: MasterPart) -> dict[str, torch.Tensor]:
        return self.rules[self._rule_of[owned.part.name].name].state[owned.master]

    def _master_part(self, part: OwnedBox) -> MasterPart:
        values = self._in_parameter(part)
        return MasterPart(part, values, torch.nn.Parameter(values.to(main_dtype(values.dtype))))

    @property
    def _met(self) -> list[MasterPart]:
        return [owned for owned in self.owned if owned.parameter is None]

    @torch.no_grad()
    def _met_masters(self) -> list[MasterPart]:
        """Masters of the divided matrices that are put together here."""
        if not self._exchange.parts:
            return []
        values = [self._in_parameter(part) for part in self._exchange.parts]
        wholes = self._exchange.gather([value.to(main_dtype(value.dtype)) for value in values])
        return [MasterPart(part, None, torch.nn.Parameter(whole)) for part, whole in zip(self._exchange.met_here, wholes, strict=True)]

    def _make_rules(self) -> dict[str, torch.optim.Optimizer]:
        made = {}
        for name, rule in {rule.name: rule for rule in self._rule_of.values()}.items():
            masters = [(owned.part.name, owned.master) for owned in self.owned if self._rule_of[owned.part.name].name == name]
            if masters:
                made[name] = rule.make(masters)
                for group in made[name].param_groups:
                    group["base_lr"] = group["lr"]
        return made
