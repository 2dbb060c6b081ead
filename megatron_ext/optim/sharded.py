"""Update rules on whole rows: each data rank owns a part of the parameters, updates it in float32 and sends it back to everyone.

Memory as in ZeRO-1 (Rajbhandari et al. 2020, section 5.1), but what a rank owns is a list of named row blocks and not a slice of one
flat buffer, so that rules and checkpoints see tensors by name.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_ext.errors import CheckpointError
from megatron_ext.optim.extension import UpdateExtension
from megatron_ext.optim.main_gradients import main_dtype
from megatron_ext.optim.ownership import OwnedBox, assign, buckets, local
from megatron_ext.optim.reduction import GradientReduction, flatten, unflatten
from megatron_ext.optim.replicas import check_replicas
from megatron_ext.parallel.grid import Grid
from megatron_ext.parallel.placement import Placement

BUCKET_BYTES = 16 * 2**20
Rule = Callable[[list[tuple[str, torch.Tensor]]], torch.optim.Optimizer]


@dataclass
class MasterPart:
    """A part of a parameter that this rank owns. ``master`` shares memory with the parameter where that is float32 or float64 itself."""

    part: OwnedBox
    parameter: torch.Tensor
    """The part in this rank's parameter."""
    master: torch.nn.Parameter


class ShardedOptimizer(torch.optim.Optimizer):
    """Reduce gradients to their owners, clip by the norm of the whole model, update, send the new values to all ranks.

    A step with dp data ranks, B bytes of main gradients and b bytes of parameters sends (B + b) (dp - 1) / dp a rank in the mean; what n
    ranks of the model hold alike (norms, tied embeddings) adds an all-reduce of each owner's part among them, 2 (n - 1) / n of its bytes,
    after which they apply equal updates and stay equal to the bit.

    Args:
        parameters: of this rank, by name, in the order of the model; tied ones once.
        placements: of the parameters.
        rule: makes the update rule from this rank's (name, master part).
        grid: the ranks.
        clip_norm: largest global gradient norm; 0: no clipping.
        overlap: send gradients while the last backward pass still computes others.
        extensions: change gradients before the rule and updates after it; with any, parameters are owned whole.

    Attributes:
        grad_norm: global norm of the last step, before clipping.
        overflow: True if the last step was skipped because its gradient norm was not finite.
        updates: steps that were not skipped.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        placements: Mapping[str, Placement],
        rule: Rule,
        grid: Grid,
        clip_norm: float,
        overlap: bool = True,
        extensions: Sequence[UpdateExtension] = (),
    ) -> None:
        self._parameters = dict(parameters)
        super().__init__([{"params": list(self._parameters.values()), "lr": 0.0}], {})
        self.placements = placements
        self._grid = grid
        self._clip_norm = clip_norm
        self._extensions = extensions
        owned = assign(placements, grid.dp.size, whole_tensors=bool(extensions))
        dtypes = {name: main_dtype(parameter.dtype) for name, parameter in self._parameters.items()}
        self._buckets = list(buckets(owned, dtypes, BUCKET_BYTES))
        self._reduction = GradientReduction(self._buckets, self._parameters, placements, grid.dp, overlap)
        self.gradients = self._reduction.gradients
        self.owned = [self._master_part(part) for part in owned if part.owner == grid.dp.rank]
        self.rule = rule([(owned.part.name, owned.master) for owned in self.owned]) if self.owned else None
        self.grad_norm = 0.0
        self.overflow = False
        self.updates = 0

    def expect_backwards(self, count: int) -> None:
        """A step begins, in which this rank runs ``count`` backward passes."""
        self._reduction.begin(count)

    def set_learning_rate(self, lr: float) -> None:
        """Learning rate of the next step."""
        for group in self.param_groups + (self.rule.param_groups if self.rule else []):
            group["lr"] = lr

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update from the gradients accumulated since the last; skipped on every rank if their global norm is not finite."""
        masters = {owned.part: owned.master for owned in self.owned}
        for part, gradient in self._reduction.finish():
            masters[part].grad = gradient
        self._sum_replicas()
        self._extend_gradients()
        self.grad_norm = self._global_norm()
        self.overflow = not math.isfinite(self.grad_norm)
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
            if self._counts(owned.part):
                yield owned.part, {"master": owned.master.detach(), **self.rule.state[owned.master]}

    @torch.no_grad()
    def load_owned_state(self, read: Callable[[OwnedBox], dict[str, torch.Tensor]]) -> None:
        """Replace this rank's parts by what ``read`` returns for them, then every rank's parameters by the new values.

        Raises:
            CheckpointError: a tensor has another shape than the part it is read for.
        """
        for owned in self.owned:
            values = read(owned.part)
            for kind, value in values.items():
                if value.ndim and value.shape != owned.master.shape:
                    seen, accepted = list(value.shape), list(owned.master.shape)
                    raise CheckpointError(f"{owned.part.name} ({kind}): the part in the checkpoint is {seen}, in the model {accepted}")
            owned.master.copy_(values.pop("master"))
            device = owned.master.device
            # A part of a wider tensor may come with its strides, which torch's fused AdamW would not look at.
            self.rule.state[owned.master] = {kind: value.to(device, main_dtype(value.dtype)).contiguous() for kind, value in values.items()}
        self.publish()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the accumulated gradients."""
        self._reduction.clear()
        for owned in self.owned:
            owned.master.grad = None

    def _sum_replicas(self) -> None:
        """Give all holders of a part the sum of their gradients, or the mean where each has the whole: the same bits to all."""
        for replicas in sorted({p.replicas for p in self.placements.values() if len(p.replicas) > 1}):
            shared = [owned for owned in self.owned if self.placements[owned.part.name].replicas == replicas]
            gradients = [owned.master.grad for owned in shared]
            if not shared:
                continue
            for owned in shared:
                if not self.placements[owned.part.name].partial:
                    owned.master.grad.mul_(1.0 / len(replicas))
            flat = self._grid.group("replicas", replicas).all_reduce(torch.cat([gradient.reshape(-1) for gradient in gradients]))
            for gradient, total in zip(gradients, unflatten(flat, [gradient.shape for gradient in gradients]), strict=True):
                gradient.copy_(total)

    def _extend_gradients(self) -> None:
        for extension in self._extensions:
            for owned in self.owned:
                extension.on_gradient(owned.part.name, owned.master.grad)

    def _global_norm(self) -> float:
        """Norm of the whole model's gradient; of replicas, the first one counts."""
        gradients = [owned.master.grad for owned in self.owned if self._counts(owned.part)]
        norms = torch.stack(torch._foreach_norm(gradients)).double() if gradients else torch.zeros(1, dtype=torch.float64)
        return math.sqrt(float(self._grid.world.sum(norms.square().sum())))

    def _update(self) -> None:
        if self.rule is not None:
            scale = self._clip_norm / (self.grad_norm + 1e-6) if self._clip_norm > 0 else 1.0
            if scale < 1.0:
                torch._foreach_mul_([owned.master.grad for owned in self.owned], scale)
            before = [owned.master.clone() for owned in self.owned] if self._extensions else []
            self.rule.step()
            for extension in self._extensions:
                for owned, old in zip(self.owned, before, strict=True):
                    extension.on_update(owned.part.name, old, owned.master)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Write the master parts of every owner, rounded to the parameters' dtype, into the parameters of all data ranks."""
        for owned in self.owned:
            if owned.parameter.data_ptr() != owned.master.data_ptr():
                owned.parameter.copy_(owned.master)
        group = self._grid.dp
        if group.size == 1:
            return
        pending = []
        for bucket in self._buckets:
            targets = [local(part, self.placements[part.name], self._parameters[part.name].detach()) for part in bucket]
            flat = flatten(targets)
            pending.append((bucket[0].owner, targets, flat, group.start_broadcast(flat, bucket[0].owner)))
        for owner, targets, flat, work in pending:
            if work is not None:
                work.wait()
            if owner != group.rank and flat.data_ptr() != targets[0].data_ptr():
                for target, values in zip(targets, unflatten(flat, [target.shape for target in targets]), strict=True):
                    target.copy_(values)

    def _counts(self, part: OwnedBox) -> bool:
        return self.placements[part.name].replicas[0] == self._grid.world.rank

    def _master_part(self, part: OwnedBox) -> MasterPart:
        values = local(part, self.placements[part.name], self._parameters[part.name].detach())
        return MasterPart(part, values, torch.nn.Parameter(values.to(main_dtype(values.dtype))))
