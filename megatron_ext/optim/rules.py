"""What the owner optimizer has to know of an update rule: how it may be divided over ranks, what it costs, and what it keeps."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.accelerators import apex
from megatron_ext.optim.adamp import AdamP
from megatron_ext.optim.adamw import AdamW, decay_groups
from megatron_ext.optim.muon import Muon
from megatron_ext.optim.options import OptimizerOptions, RuleName
from megatron_ext.optim.sharded_adamp import ShardedAdamP
from megatron_ext.parallel.group import Group
from megatron_ext.parallel.placement import Placement

Named = list[tuple[str, Tensor]]
"""Names and float32 (float64) masters."""
HEADS = ("*.self_attn.q_proj.weight", "*.self_attn.k_proj.weight", "*.self_attn.v_proj.weight")
"""Matrices whose rows are those of attention heads, one head after another."""
ADAM_STATE = (frozenset({"exp_avg", "exp_avg_sq", "step"}),)


def _elements(shape: Sequence[int]) -> float:
    return 20.0 * prod(shape)


def _orthogonalization(shape: Sequence[int]) -> float:
    return 20.0 * prod(shape) * min(shape)


@dataclass(frozen=True)
class Rule:
    """An update rule for some parameters."""

    name: str
    make: Callable[[Named], torch.optim.Optimizer]
    """Makes it for the masters that a rank owns. Every parameter group has its base learning rate as ``lr``."""
    share: Literal["rows", "part", "whole"] = "rows"
    """What one rank may own: some ``rows`` (element-wise rules), the ``part`` of a parameter that a tensor-parallel rank holds, or only
    the ``whole`` parameter."""
    state: tuple[frozenset[str], ...] = ADAM_STATE
    """Kinds of state that it keeps; those of one set mean nothing without each other."""
    cost: Callable[[Sequence[int]], float] = _elements
    """Operations, about, of one update of a parameter of some shape."""

    def kept(self, saved: Collection[str]) -> set[str]:
        """Which kinds of a saved state this rule goes on with."""
        return {kind for together in self.state if together <= set(saved) for kind in together}


def build_rules(options: OptimizerOptions, placements: Mapping[str, Placement], tp: Group, head_dim: int) -> dict[RuleName, Rule]:
    """The rules that options ask for, by name; adamw is always one.

    Args:
        options: of the optimizer.
        placements: of the parameters of this rank.
        tp: the tensor-parallel ranks.
        head_dim: rows of a head in the projections of attention.
    """
    rules: dict[RuleName, Rule] = {"adamw": _adamw(options)}
    for name in sorted(options.rules):
        rules[name] = _adamp(options, placements, tp) if name == "adamp" else _muon(options, name, head_dim)
    return rules


def _adamw(options: OptimizerOptions) -> Rule:
    def make(named: Named) -> torch.optim.Optimizer:
        numbers: dict[str, Any] = dict(lr=options.lr, betas=tuple(options.betas), eps=options.eps)
        groups = decay_groups(named, options.weight_decay)
        if options.adamw == "torch":
            return AdamW(groups, **numbers)
        reason = apex.status(named[0][1].device).services["AdamW"]
        if reason is not None:
            raise ConfigError(f"optimizer.adamw: 'apex'; accepted here: torch, because AdamW by apex {reason}")
        return apex.fused_adamw(groups, weight_decay=options.weight_decay, **numbers)

    return Rule("adamw", make)


def _adamp(options: OptimizerOptions, placements: Mapping[str, Placement], tp: Group) -> Rule:
    adamp = options.adamp
    lr = options.base_lr("adamp")
    numbers = dict(betas=tuple(options.betas), eps=options.eps, weight_decay=options.weight_decay)
    numbers |= dict(delta=adamp.delta, wd_ratio=adamp.wd_ratio, nesterov=adamp.nesterov, fused=adamp.fused)

    def make(named: Named) -> torch.optim.Optimizer:
        if tp.size > 1:
            return ShardedAdamP(named, placements, tp, lr=lr, **numbers)
        return AdamP([master for _, master in named], lr=lr, **numbers)

    return Rule("adamp", make, "part")


def _muon(options: OptimizerOptions, name: RuleName, head_dim: int) -> Rule:
    muon, normuon = options.muon, name == "normuon"

    def make(named: Named) -> torch.optim.Optimizer:
        by_heads = {each: len(master) // head_dim for each, master in named if any(fnmatchcase(each, pattern) for pattern in HEADS)}
        return Muon(
            named,
            lr=options.base_lr(name),
            weight_decay=options.weight_decay if muon.weight_decay is None else muon.weight_decay,
            momentum=muon.momentum,
            nesterov=muon.nesterov,
            ns_steps=muon.ns_steps,
            adjust_lr_fn=muon.scale,
            coefficients=muon.coefficients,
            split=by_heads if muon.split_heads else None,
            method=muon.method,
            dtype=None if muon.ns_dtype == "auto" else getattr(torch, muon.ns_dtype),
            normuon=normuon,
            beta2=muon.beta2,
        )

    state = (frozenset({"momentum_buffer"}), *([frozenset({"second_moment"})] if normuon else []))
    return Rule(name, make, "whole" if muon.tp_mode == "gather" else "part", state, _orthogonalization)
