"""All methods of a run around one update of the parts that a rank owns: their state, and what they freeze."""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from megatron_ext.optim.extension import UpdateExtension
from megatron_ext.optim.main_gradients import main_dtype
from megatron_ext.optim.ownership import OwnedBox
from megatron_ext.optim.state_change import StateChange

State = MutableMapping[str, Tensor]


class FrozenRows:
    """Rows of some tensors as they are now, to be put back.

    Args:
        frozen: bool [rows].
        tensors: by kind; those without these rows (numbers of steps) are left alone.
    """

    def __init__(self, frozen: Tensor, tensors: Mapping[str, Tensor]) -> None:
        self._rows = frozen.nonzero().squeeze(1)
        self._count = len(frozen)
        self._values = {kind: tensor[self._rows] for kind, tensor in self._with_rows(tensors)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the rows back; those of a tensor that did not exist become zeros, as which moments begin."""
        for kind, tensor in self._with_rows(tensors):
            tensor[self._rows] = self._values.get(kind, 0.0)

    def _with_rows(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        return ((kind, tensor) for kind, tensor in tensors.items() if tensor.ndim and len(tensor) == self._count)


class Extensions:
    """What ``methods`` do, in their order, and the state that they keep of the parts of this rank."""

    def __init__(self, methods: Sequence[UpdateExtension]) -> None:
        self._methods = list(methods)
        self._state: dict[OwnedBox, dict[str, Tensor]] = {}
        self._before: dict[OwnedBox, Tensor] = {}
        self._frozen: dict[OwnedBox, FrozenRows | None] = {}
        """Parts that the step does not update, or of which it does not update some rows."""

    def __bool__(self) -> bool:
        return bool(self._methods)

    @property
    def need_whole(self) -> bool:
        """A method needs parameters owned whole."""
        return any(method.needs_whole for method in self._methods)

    def begin(self, part: OwnedBox, master: Tensor, saved: State) -> list[StateChange]:
        """Take the state of a part out of ``saved``, by kind; what is not there begins anew, which is returned if anything was saved."""
        resumed = bool(saved)
        state = {kind: value for method in self._methods for kind, value in method.first_state(part, master).items()}
        missing = state.keys() - saved.keys()
        for kind in state.keys() - missing:
            state[kind] = saved.pop(kind).to(master.device, main_dtype(master.dtype)).contiguous()
        self._state[part] = state
        return [StateChange(part.name, "methods", kind, "begins anew") for kind in sorted(missing)] if resumed else []

    def state(self, part: OwnedBox) -> dict[str, Tensor]:
        """What the methods keep of a part, by kind."""
        return self._state.get(part, {})

    def prepare(self, step: int) -> None:
        """See ``UpdateExtension``."""
        for method in self._methods:
            method.prepare(step)

    def change_gradient(self, part: OwnedBox, gradient: Tensor) -> None:
        """Let the methods change the gradient of a part; that of what is frozen becomes 0."""
        for method in self._methods:
            method.on_gradient(part, gradient)
        updated = self._updated(part)
        if updated is False:
            gradient.zero_()
        elif isinstance(updated, Tensor):
            gradient[~updated.to(gradient.device)] = 0.0

    def before_update(self, part: OwnedBox, master: Tensor, rule_state: State) -> None:
        """Keep what the update must not change. A part that is frozen whole loses its gradient, so that its rule passes it over."""
        updated = self._updated(part)
        if updated is False:
            master.grad = None
            self._frozen[part] = None
            return
        if isinstance(updated, Tensor):
            self._frozen[part] = FrozenRows(~updated.to(master.device), self._tensors(part, master, rule_state))
        if any(method.needs_before for method in self._methods):
            self._before[part] = master.detach().clone()

    def is_frozen(self, part: OwnedBox) -> bool:
        """The step does not change any value of the part."""
        return part in self._frozen and self._frozen[part] is None

    def after_update(self, part: OwnedBox, master: Tensor) -> None:
        """Let the methods change what the rule did."""
        before = self._before.pop(part, None)
        for method in self._methods:
            method.on_update(part, master, self.state(part), before if method.needs_before else None)

    def restore(self, part: OwnedBox, master: Tensor, rule_state: State) -> None:
        """Put back what is frozen, at the end of the update."""
        kept = self._frozen.pop(part, None)
        if kept is not None:
            kept.restore(self._tensors(part, master, rule_state))

    def _tensors(self, part: OwnedBox, master: Tensor, rule_state: State) -> dict[str, Tensor]:
        return {"master": master.detach(), **rule_state, **self.state(part)}

    def _updated(self, part: OwnedBox) -> bool | Tensor:
        """What all methods update."""
        answers = [method.updated(part) for method in self._methods]
        rows = [answer for answer in answers if isinstance(answer, Tensor)]
        if False in [answer for answer in answers if isinstance(answer, bool)]:
            return False
        return torch.stack(rows).all(0) if rows else True
