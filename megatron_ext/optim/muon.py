"""Muon: momentum whose matrices are orthogonalized (Jordan et al. 2024, kellerjordan.github.io/posts/muon), and NorMuon."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.newton_schulz import METHODS, newton_schulz, select_polynomials
from megatron_ext.optim.main_gradients import main_dtype
from megatron_ext.parallel.device import choose_dtype

Polynomial = tuple[float, float, float]
Split = int | Sequence[int]

BATCH_ELEMENTS = 2**26
"""Most elements that are orthogonalized together: enough to fill a GPU, little beside the momentum."""


def _jordan(rows: int, columns: int) -> float:
    return math.sqrt(max(1, rows / columns))


SCALES: dict[str, Callable[[int, int], float]] = {
    # Liu et al. 2025 (Moonlight, arXiv:2502.16982, section 2.2): entries of an update as large as those of AdamW.
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    # Megatron-LM's: entries of root mean square 1.
    "spectral": lambda rows, columns: math.sqrt(max(rows, columns)),
    "jordan": _jordan,
    "original": _jordan,
}
"""Factor of the learning rate by rows and columns of what is orthogonalized; ``original`` is torch.optim.Muon's name for ``jordan``."""


@dataclass
class Block:
    """Rows of a parameter that are orthogonalized by themselves, as views."""

    weight: Tensor
    gradient: Tensor
    state: dict[str, Tensor]


class Muon(torch.optim.Optimizer):
    """m <- lerp(m, g, 1 - momentum); u = lerp(g, m, momentum); W <- (1 - lr weight_decay) W - lr scale newton_schulz(u).

    Set alike (``ns_coefficients=(3.4445, -4.775, 2.0315)``, ``eps=1e-7``, ``method="standard"``, ``dtype=torch.bfloat16``) it computes bit
    for bit what torch.optim.Muon does on float32 parameters, and reads its state dict. State by parameter, float32 (float64 of float64
    parameters): ``momentum_buffer`` of its shape; with ``normuon`` also ``second_moment`` [rows].

    Args:
        params: matrices, or parameter groups, which may set any argument below; named ones if ``split`` goes by name.
        lr: learning rate.
        weight_decay: decoupled decay, multiplied by ``lr`` but not by the scale.
        momentum: decay of the momentum, in [0, 1).
        nesterov: orthogonalize lerp(g, m, momentum) rather than m.
        ns_coefficients: (a, b, c) of every step, as torch.optim.Muon takes them; takes precedence over ``coefficients``.
        eps: a smaller Frobenius norm of a block counts as this, so that what has no gradient any more comes to rest.
        ns_steps: Newton-Schulz steps; None: as many as the coefficients are made for (5; ``deepseek_v4``: 10).
        adjust_lr_fn: a key of ``SCALES``; None is ``original``, as in torch.optim.Muon.
        coefficients: as in ``newton_schulz``.
        split: which blocks of rows are orthogonalized by themselves, as if they were matrices of their own: their numbers of rows (q, k
            and v of a fused tensor), or the number of equal ones (heads); a mapping gives this by parameter name.
        method: ``standard``, ``gram`` or ``auto``, as in ``newton_schulz``.
        dtype: of Newton-Schulz; None: float64 for float64 parameters, else what the device is fast at, bfloat16 or float32. float16 is as
            fast as bfloat16 on GPUs and more exact.
        normuon: divide each row by the root of its second moment (Li et al. 2025, arXiv:2510.05491, algorithm 1), and then restore the
            Frobenius norm of the orthogonal matrix, where the paper sets a constant one.
        beta2: decay of NorMuon's second moment, in [0, 1).
        backend: of ``newton_schulz``.

    Attributes:
        orthogonalizations: matrices orthogonalized in the last step.

    Raises:
        ConfigError: a parameter is no matrix, a split does not fit it, or an argument is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Polynomial | None = None,
        eps: float = 1e-20,
        ns_steps: int | None = None,
        adjust_lr_fn: str | None = "match_rms_adamw",
        *,
        coefficients: str | Sequence[Polynomial] = "polar_express",
        split: Split | Mapping[str, Split] | None = None,
        method: str = "auto",
        dtype: torch.dtype | None = None,
        normuon: bool = False,
        beta2: float = 0.95,
        backend: str | None = None,
    ) -> None:
        self.orthogonalizations = 0
        torch_arguments = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, eps=eps)
        torch_arguments |= dict(ns_coefficients=ns_coefficients, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn)
        ours = dict(coefficients=coefficients, split=split, method=method, dtype=dtype, normuon=normuon, beta2=beta2, backend=backend)
        super().__init__(params, torch_arguments | ours)
        names = {name for group in self.param_groups for name in group.get("param_names", ())}
        for group in self.param_groups:
            unknown = sorted(set(group["split"]) - names) if isinstance(group["split"], Mapping) else []
            if unknown:
                raise ConfigError(f"Muon's split names {', '.join(unknown)}; accepted are names of its named parameters")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch.optim.Optimizer. Raises ConfigError as the constructor does."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check(group)
        for name, parameter, split in _named(group):
            if parameter.ndim != 2:
                raise ConfigError(f"{name} {list(parameter.shape)} is given to Muon, which accepts matrices; give it to AdamW")
            _row_counts(name, parameter, split)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient. Returns what ``closure`` returns."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        self.orthogonalizations = 0
        for group in self.param_groups:
            alike: dict[tuple[torch.Size, torch.dtype, torch.device], list[Block]] = defaultdict(list)
            for block in self._blocks(group):
                alike[block.weight.shape, block.weight.dtype, block.weight.device].append(block)
            for (shape, *_), blocks in alike.items():
                rest = iter(blocks)
                while batch := list(islice(rest, max(1, BATCH_ELEMENTS // max(1, shape.numel())))):
                    _update(batch, group)
                    self.orthogonalizations += len(batch)
        return loss

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, or of torch.optim.Muon: settings that it does not have stay as they are."""
        saved = state_dict["param_groups"]
        if len(saved) == len(self.param_groups):
            saved = [{**own, **group} for own, group in zip(self.param_groups, saved, strict=True)]
        super().load_state_dict({**state_dict, "param_groups": saved})
        # Again, because torch rounds the state to the parameter's dtype.
        indices = chain.from_iterable(group["params"] for group in saved)
        for index, parameter in zip(indices, chain.from_iterable(group["params"] for group in self.param_groups), strict=True):
            for kind, value in state_dict["state"].get(index, {}).items():
                self.state[parameter][kind] = value.to(parameter.device, main_dtype(parameter.dtype), copy=True)

    def _blocks(self, group: dict[str, Any]) -> Iterator[Block]:
        for name, parameter, split in _named(group):
            if parameter.grad is None:
                continue
            state, wide = self.state[parameter], main_dtype(parameter.dtype)
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter, dtype=wide)
            if group["normuon"] and "second_moment" not in state:
                state["second_moment"] = torch.zeros(len(parameter), dtype=wide, device=parameter.device)
            rows = _row_counts(name, parameter, split)
            states = {kind: value.split(rows) for kind, value in state.items()}
            for number, (weight, gradient) in enumerate(zip(parameter.split(rows), parameter.grad.split(rows), strict=True)):
                yield Block(weight, gradient, {kind: parts[number] for kind, parts in states.items()})


def _update(blocks: Sequence[Block], group: Mapping[str, Any]) -> None:
    """Momentum, orthogonalization and step of blocks of one shape and dtype."""
    directions = []
    for block in blocks:
        momentum = block.state["momentum_buffer"]
        gradient = block.gradient.to(momentum.dtype)
        momentum.lerp_(gradient, 1 - group["momentum"])
        directions.append(gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum)
    weight = blocks[0].weight
    orthogonal = newton_schulz(
        torch.stack(directions),
        group["ns_steps"],
        group["ns_coefficients"] or group["coefficients"],
        group["method"],
        dtype=group["dtype"] or (torch.float64 if weight.dtype == torch.float64 else _fast_dtype(weight.device)),
        eps=group["eps"],
        backend=group["backend"],
    )
    if group["normuon"]:
        orthogonal = _even_rows(orthogonal, [block.state["second_moment"] for block in blocks], group["beta2"])
    lr = float(group["lr"])
    scale = SCALES[group["adjust_lr_fn"] or "original"](*weight.shape)
    for block, update in zip(blocks, orthogonal, strict=True):
        block.weight.mul_(1 - lr * group["weight_decay"])
        block.weight.add_(update, alpha=-lr * scale)


@cache
def _fast_dtype(device: torch.device) -> torch.dtype:
    return choose_dtype("auto", device)[0]


def _even_rows(updates: Tensor, second_moments: Sequence[Tensor], beta2: float) -> Tensor:
    """NorMuon: each row of ``updates`` [batch, m, n] over the root of its second moment [m], which is updated; norms stay as they are."""
    updates = updates.to(second_moments[0].dtype)
    moments = torch.stack(list(second_moments)).lerp_(updates.square().mean(-1), 1 - beta2)
    for kept, moment in zip(second_moments, moments, strict=True):
        kept.copy_(moment)
    even = updates / (moments.sqrt() + 1e-8)[..., None]
    norm, even_norm = (torch.linalg.vector_norm(part, dim=(-2, -1), keepdim=True) for part in (updates, even))
    return even * (norm / even_norm.masked_fill(even_norm == 0, 1.0))


def _named(group: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, Split | None]]:
    """Name, parameter and split of the parameters of a group; without names, their numbers."""
    split = group["split"]
    names = group.get("param_names") or [f"parameter {number}" for number in range(len(group["params"]))]
    for name, parameter in zip(names, group["params"], strict=True):
        yield name, parameter, split.get(name) if isinstance(split, Mapping) else split


def _row_counts(name: str, parameter: Tensor, split: Split | None) -> list[int]:
    """Rows of each block of a parameter."""
    rows = len(parameter)
    if split is None:
        return [rows]
    if isinstance(split, int):
        if split < 1 or rows % split:
            raise ConfigError(f"Muon's split of {name} is {split}; accepted is a number of blocks that divides its {rows} rows")
        return [rows // split] * split
    if sum(split) != rows or min(split) < 1:
        raise ConfigError(f"Muon's split of {name} is {list(split)}; accepted are positive numbers that add up to its {rows} rows")
    return list(split)


def _check(group: Mapping[str, Any]) -> None:
    select_polynomials(group["ns_coefficients"] or group["coefficients"], group["ns_steps"])
    scales = (None, *SCALES)
    for fits, key, accepted in (
        (float(group["lr"]) >= 0, "lr", "at least 0"),
        (group["weight_decay"] >= 0, "weight_decay", "at least 0"),
        (0 <= group["momentum"] < 1, "momentum", "at least 0 and less than 1"),
        (group["eps"] >= 0, "eps", "at least 0"),
        (0 <= group["beta2"] < 1, "beta2", "at least 0 and less than 1"),
        (group["adjust_lr_fn"] in scales, "adjust_lr_fn", ", ".join(map(str, scales))),
        (group["method"] in METHODS, "method", ", ".join(METHODS)),
    ):
        if not fits:
            raise ConfigError(f"Muon's {key} is {group[key]!r}; accepted: {accepted}")
