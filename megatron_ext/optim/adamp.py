"""AdamP and SGDP (Heo et al., ICLR 2021, arXiv:2006.08217): optimizers that do not lengthen parameters whose scale does not matter.

Whole tensors in one process: a parameter must have its own shape, because on a flattened one (ZeRO's, FSDP1's) there is no row to project
and AdamP would be AdamW. The parts that work on shards are ``megatron_ext.kernels.projection`` and ``megatron_ext.kernels.adamp``.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ext.kernels.adamp import AdamUpdate, adamp_step
from megatron_ext.kernels.projection import as_rows, matrices, project, row_sums, summarize
from megatron_ext.option_rules import require

Closure = Callable[[], Any] | None
BATCH = 4 * 2**20
"""Values that are updated together: enough to hide the cost of starting operations, few enough that temporaries stay small."""


class AdamP(torch.optim.Optimizer):
    """AdamP (algorithm 2), with the arguments, the state and, in float32 and float64 on the CPU, the bits of PyPI ``adamp``.

    Equal to the bit unless a cosine lies within rounding of its bound: the decisions are made on the device, from sums in float64, and
    nothing waits for it. Temporary memory: a few times that of the largest parameter; with ``fused`` four numbers a row.

    Args:
        params: tensors or parameter groups.
        lr: learning rate.
        betas: decay of the first and second moments.
        eps: added to the root of the second moment and to norms.
        weight_decay: decoupled decay, multiplied by ``lr``.
        delta: a cosine of gradient and parameter below ``delta`` / sqrt(size of a row or layer) means that the scale does not matter.
        wd_ratio: strength of the weight decay of projected parameters.
        nesterov: use the moment of the next step.
        fused: the C++ step of ``megatron_ext.kernels.adamp`` on as many threads as PyTorch has, for contiguous float32 parameters on
            the CPU; equal within 1e-6. Built when first used.

    Raises:
        ConfigError: an argument out of its range; in ``step``, a tensor that ``fused`` cannot take.
        KernelBuildError: in ``step`` with ``fused``, if there is no C++ compiler.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        *,
        fused: bool = False,
    ) -> None:
        _require_ranges(lr, eps, weight_decay, delta, wd_ratio)
        require((all(0 <= beta < 1 for beta in betas), "betas", betas, "two numbers, each at least 0 and less than 1"))
        shared = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "delta": delta, "wd_ratio": wd_ratio}
        super().__init__(params, {**shared, "nesterov": nesterov, "fused": fused})

    @torch.no_grad()
    def step(self, closure: Closure = None) -> Any:
        """One update of every parameter that has a gradient; returns what ``closure`` returns."""
        loss = _evaluate(closure)
        for group in self.param_groups:
            for steps, parameters in self._by_age(group).items():
                adam = AdamUpdate(steps, group["betas"], group["eps"], group["nesterov"])
                if group["fused"]:
                    rule = {key: group[key] for key in ("lr", "weight_decay", "delta", "wd_ratio")}
                    adamp_step(*self._tensors(parameters), adam, **rule, backend="cpu", threads=torch.get_num_threads())
                    continue
                for batch in _batches(parameters):
                    _, gradients, *moments = self._tensors(batch)
                    adam.change_moments(gradients, *moments)
                    step_size = group["lr"] / adam.corrections[0]
                    decay = group["lr"] * group["weight_decay"]
                    _apply(batch, gradients, adam.of_moments(gradients, *moments), group, decay, step_size)
        return loss

    def _by_age(self, group: dict[str, Any]) -> dict[int, list[Tensor]]:
        """The group's parameters that have gradients, by the number that this step is for them."""
        ages: dict[int, list[Tensor]] = {}
        for p in _with_gradients(group):
            state = self.state[p]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            steps = int(state["step"]) + 1
            # On the host, so that reading it does not wait for the device, wherever a checkpoint had put it.
            state["step"] = torch.tensor(float(steps))
            ages.setdefault(steps, []).append(p)
        return ages

    def _tensors(self, parameters: list[Tensor]) -> tuple[list[Tensor], ...]:
        """Parameters, gradients, first and second moments."""
        states = [self.state[p] for p in parameters]
        return parameters, [p.grad for p in parameters], [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]


class SGDP(torch.optim.Optimizer):
    """SGDP (algorithm 1), with the arguments, the state and, in float32 and float64 on the CPU, the bits of PyPI ``adamp``; see ``AdamP``.

    Two things are as in the published code and not as in the paper: weight decay is divided by 1 - ``momentum``, and without ``nesterov``
    the projection also changes the momentum that is kept for the next step.

    Args:
        params: tensors or parameter groups.
        lr: learning rate.
        momentum: decay of the momentum, less than 1.
        dampening: the gradient enters the momentum multiplied by 1 - ``dampening``.
        weight_decay: decoupled decay, multiplied by ``lr`` / (1 - ``momentum``).
        nesterov: use the gradient plus ``momentum`` times the momentum.
        eps: added to norms.
        delta: as in ``AdamP``.
        wd_ratio: as in ``AdamP``.

    Raises:
        ConfigError: an argument out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
    ) -> None:
        _require_ranges(lr, eps, weight_decay, delta, wd_ratio)
        require((0 <= momentum < 1, "momentum", momentum, "at least 0 and less than 1"))
        shared = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "delta": delta, "wd_ratio": wd_ratio}
        super().__init__(params, {**shared, "momentum": momentum, "dampening": dampening, "nesterov": nesterov})

    @torch.no_grad()
    def step(self, closure: Closure = None) -> Any:
        """One update of every parameter that has a gradient; returns what ``closure`` returns."""
        loss = _evaluate(closure)
        for group in self.param_groups:
            for batch in _batches(_with_gradients(group)):
                gradients = [p.grad for p in batch]
                updates = self._updates(batch, gradients, group)
                _apply(batch, gradients, updates, group, group["lr"] * group["weight_decay"], group["lr"], 1 - group["momentum"])
        return loss

    def _updates(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Update the momenta; returns them, or with ``nesterov`` what is a step ahead of them."""
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients, alpha=1 - group["dampening"])
        if not group["nesterov"]:
            return momenta
        return torch._foreach_add(gradients, torch._foreach_mul(momenta, group["momentum"]))


def _apply(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    updates: Sequence[Tensor],
    group: dict[str, Any],
    decay: float,
    step_size: float,
    decay_divisor: float = 1.0,
) -> None:
    """Project ``updates`` in place, decay the parameters and subtract ``step_size`` times the updates from them."""
    eps = group["eps"]
    here = matrices(tuple(p.shape for p in parameters), group["delta"], parameters[0].device)
    sums = torch.cat([row_sums(*tensors) for tensors in zip(parameters, gradients, updates, strict=True)])
    projection = project(sums, summarize(sums, here, eps), here, eps)
    for p, u, channel, layer in zip(parameters, updates, projection.channel.unbind(), projection.layer.unbind(), strict=True):
        projected = channel | layer
        # On a CPU a look at the decision is free; elsewhere it would wait for the device, so there both outcomes are computed.
        if p.ndim > 1 and (p.device.type != "cpu" or bool(projected)):
            u.copy_(torch.where(projected, _without_radial(as_rows(p), as_rows(u), channel, eps).view_as(u), u))
        if decay > 0:
            factors = (1 - decay * ratio / decay_divisor for ratio in (group["wd_ratio"], 1))
            p.mul_(torch.where(projected, *(torch.full((), factor, dtype=p.dtype, device=p.device) for factor in factors)))
        p.add_(u, alpha=-step_size)


def _without_radial(p: Tensor, u: Tensor, channel: Tensor, eps: float) -> Tensor:
    """``u`` [rows, width] without its part along each row of ``p`` if ``channel`` (bool, []), else along all of ``p``.

    With all of a matrix at hand, the products are summed after the division by the norm, as in the published code: the same bits.
    """
    norm = torch.where(channel, p.norm(dim=1, keepdim=True), p.reshape(1, -1).norm(dim=1, keepdim=True))
    unit = p / (norm + eps)
    along = unit * u
    return u - unit * torch.where(channel, along.sum(1, keepdim=True), along.reshape(1, -1).sum(1, keepdim=True))


def _evaluate(closure: Closure) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _with_gradients(group: dict[str, Any]) -> list[Tensor]:
    return [p for p in group["params"] if p.grad is not None and p.numel()]


def _batches(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """``parameters`` in order, in lists of about ``BATCH`` values, or of one tensor that is larger."""
    batch: list[Tensor] = []
    for p in parameters:
        if batch and sum(other.numel() for other in batch) + p.numel() > BATCH:
            yield batch
            batch = []
        batch.append(p)
    if batch:
        yield batch


def _require_ranges(lr: float, eps: float, weight_decay: float, delta: float, wd_ratio: float) -> None:
    require(
        (lr >= 0, "lr", lr, "at least 0"),
        (eps > 0, "eps", eps, "more than 0"),
        (weight_decay >= 0, "weight_decay", weight_decay, "at least 0"),
        (delta >= 0, "delta", delta, "at least 0"),
        (0 <= wd_ratio <= 1, "wd_ratio", wd_ratio, "between 0 and 1"),
    )
