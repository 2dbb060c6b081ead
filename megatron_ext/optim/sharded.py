"""Update rules on whole rows: each data rank owns a part of the parameters, updates it in float32 and sends it back to everyone.

Memory as in ZeRO-1 (Rajbhandari et al. 2020, section 5.1), but what a rank owns is a list of named row blocks and not a slice of one
flat buffer, so that rules and checkpoints see tensors by name.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_ext.errors import CheckpointError
from megatron_ext.optim.main_gradients import MainGradients, main_dtype
from megatron_ext.optim.ownership import OwnedRows, assign_rows
from megatron_ext.parallel.world import World

BUCKET_BYTES = 64 * 2**20
Rule = Callable[[list[tuple[str, torch.Tensor]]], torch.optim.Optimizer]


@dataclass
class MasterRows:
    """Rows that this rank owns. ``master`` shares memory with the parameter where that is float32 or float64 itself."""

    rows: OwnedRows
    parameter: torch.nn.Parameter
    master: torch.nn.Parameter


class ShardedOptimizer(torch.optim.Optimizer):
    """Reduce gradients to their owners, clip by the norm of the whole model, update, send the new values to all ranks.

    Args:
        named_parameters: all parameters of the model, in the same order on every rank; tied ones once.
        rule: makes the update rule from this rank's (name, master rows).
        world: the data ranks.
        clip_norm: largest global gradient norm; 0: no clipping.

    Attributes:
        grad_norm: global norm of the last step, before clipping.
        overflow: True if the last step was skipped because its gradient norm was not finite.
        updates: steps that were not skipped.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]], rule: Rule, world: World, clip_norm: float) -> None:
        self._parameters = dict(named_parameters)
        super().__init__([{"params": list(self._parameters.values()), "lr": 0.0}], {})
        self._world = world
        self._clip_norm = clip_norm
        self.gradients = MainGradients(self._parameters)
        ownership = assign_rows({name: p.shape for name, p in self._parameters.items()}, world.size)
        self._buckets = list(_buckets(ownership, self._parameters))
        self.owned = [_master_rows(rows, self._parameters[rows.name]) for rows in ownership if rows.owner == world.rank]
        self.rule = rule([(owned.rows.name, owned.master) for owned in self.owned]) if self.owned else None
        self.grad_norm = 0.0
        self.overflow = False
        self.updates = 0

    def set_learning_rate(self, lr: float) -> None:
        """Learning rate of the next step."""
        for group in self.param_groups + (self.rule.param_groups if self.rule else []):
            group["lr"] = lr

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update from the gradients accumulated since the last; skipped on every rank if their global norm is not finite."""
        self._reduce_to_owners()
        self.grad_norm = self._global_norm()
        self.overflow = not math.isfinite(self.grad_norm)
        if not self.overflow:
            self._update()
            self.updates += 1
        self.zero_grad()

    @property
    def parameter_rows(self) -> dict[str, int]:
        """Rows of each parameter by name, in the order of the model; one without dimensions is a row."""
        return {name: len(parameter) if parameter.ndim else 1 for name, parameter in self._parameters.items()}

    def owned_state(self) -> Iterator[tuple[OwnedRows, dict[str, torch.Tensor]]]:
        """The rows that this rank owns with what resuming needs: ``master`` and the rule's state, by kind."""
        for owned in self.owned:
            yield owned.rows, {"master": owned.master.detach(), **self.rule.state[owned.master]}

    @torch.no_grad()
    def load_owned_state(self, read: Callable[[OwnedRows], dict[str, torch.Tensor]]) -> None:
        """Replace this rank's rows by what ``read`` returns for them, then every rank's parameters by the new values.

        Raises:
            CheckpointError: a tensor has another shape than the rows it is read for.
        """
        for owned in self.owned:
            values = read(owned.rows)
            for kind, value in values.items():
                if value.ndim and value.shape != owned.master.shape:
                    seen, accepted = list(value.shape), list(owned.master.shape)
                    raise CheckpointError(f"{owned.rows.name} ({kind}): rows of the checkpoint are {seen}, of the model {accepted}")
            owned.master.copy_(values.pop("master"))
            device = owned.master.device
            self.rule.state[owned.master] = {kind: value.to(device, main_dtype(value.dtype)) for kind, value in values.items()}
        self.publish()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the accumulated gradients."""
        self.gradients.clear()
        for owned in self.owned:
            owned.master.grad = None

    def _reduce_to_owners(self) -> None:
        masters = {owned.rows: owned.master for owned in self.owned}
        if self._world.size == 1:
            for rows, master in masters.items():
                master.grad = _rows_of(self.gradients[rows.name], rows)
            return
        pending = []
        for bucket in self._buckets:
            flat = _flatten([_rows_of(self.gradients[rows.name], rows) for rows in bucket])
            pending.append((bucket, flat, dist.reduce(flat, dst=bucket[0].owner, async_op=True)))
        for bucket, flat, work in pending:
            work.wait()
            if bucket[0].owner == self._world.rank:
                for rows, gradient in _unflatten(flat, [(rows, masters[rows]) for rows in bucket]):
                    masters[rows].grad = gradient

    def _global_norm(self) -> float:
        gradients = [owned.master.grad for owned in self.owned]
        norms = torch.stack(torch._foreach_norm(gradients)).double() if gradients else torch.zeros(1, dtype=torch.float64)
        return math.sqrt(float(self._world.sum(norms.square().sum())))

    def _update(self) -> None:
        if self.rule is not None:
            scale = self._clip_norm / (self.grad_norm + 1e-6) if self._clip_norm > 0 else 1.0
            if scale < 1.0:
                torch._foreach_mul_([owned.master.grad for owned in self.owned], scale)
            self.rule.step()
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Write the master rows of every owner, rounded to the parameters' dtype, into the parameters of all ranks."""
        for owned in self.owned:
            target = _rows_of(owned.parameter, owned.rows)
            if target.data_ptr() != owned.master.data_ptr():
                target.copy_(owned.master)
        if self._world.size == 1:
            return
        pending = []
        for bucket in self._buckets:
            targets = [(rows, _rows_of(self._parameters[rows.name], rows)) for rows in bucket]
            flat = _flatten([target for _, target in targets])
            pending.append((targets, flat, dist.broadcast(flat, src=bucket[0].owner, async_op=True)))
        for targets, flat, work in pending:
            work.wait()
            if targets[0][0].owner != self._world.rank:
                for (_, values), (_, target) in zip(_unflatten(flat, targets), targets, strict=True):
                    target.copy_(values)


def _master_rows(rows: OwnedRows, parameter: torch.nn.Parameter) -> MasterRows:
    values = _rows_of(parameter.detach(), rows)
    return MasterRows(rows, parameter, torch.nn.Parameter(values.to(main_dtype(parameter.dtype))))


def _rows_of(tensor: torch.Tensor, rows: OwnedRows) -> torch.Tensor:
    return tensor[rows.start : rows.stop] if tensor.ndim else tensor


def _flatten(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _unflatten(flat: torch.Tensor, like: Sequence[tuple[OwnedRows, torch.Tensor]]) -> Iterator[tuple[OwnedRows, torch.Tensor]]:
    offset = 0
    for rows, tensor in like:
        yield rows, flat[offset : offset + tensor.numel()].view(tensor.shape)
        offset += tensor.numel()


def _buckets(ownership: Sequence[OwnedRows], parameters: Mapping[str, torch.Tensor]) -> Iterator[list[OwnedRows]]:
    """Consecutive rows of the same owner and dtype, about ``BUCKET_BYTES`` at a time: what one collective moves."""
    bucket: list[OwnedRows] = []
    filled = 0
    for rows in ownership:
        parameter = parameters[rows.name]
        size = _rows_of(parameter, rows).numel() * parameter.element_size()
        first = parameters[bucket[0].name] if bucket else parameter
        if bucket and (bucket[0].owner != rows.owner or first.dtype != parameter.dtype or filled + size > BUCKET_BYTES):
            yield bucket
            bucket, filled = [], 0
        bucket.append(rows)
        filled += size
    if bucket:
        yield bucket
