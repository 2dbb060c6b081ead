"""Grids and owner optimizers for tests that need no more than data parallelism."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from megatron_ext.optim.rules import Named, Rule
from megatron_ext.optim.sharded import ShardedOptimizer
from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.placement import Placement, whole_box
from megatron_ext.parallel.world import World

ALONE = World(0, 1, torch.device("cpu"))


def data_grid(world: World = ALONE) -> Grid:
    """Every rank is a data rank."""
    return Grid(world, GridShape(1, world.size, 1))


Make = Callable[[Named], torch.optim.Optimizer]


def everywhere(make: Make, names: Iterable[str]) -> dict[str, Rule]:
    """One rule for all parameters."""
    return dict.fromkeys(names, Rule("adamw", make))


def owner_optimizer(
    named: Iterable[tuple[str, torch.nn.Parameter]], make: Make, world: World = ALONE, clip_norm: float = 0.0, **options: Any
) -> ShardedOptimizer:
    """An optimizer of parameters that every rank holds whole."""
    parameters = dict(named)
    placements = {name: Placement(p.shape, whole_box(p.shape), (world.rank,), False) for name, p in parameters.items()}
    return ShardedOptimizer(parameters, placements, everywhere(make, parameters), data_grid(world), clip_norm, **options)
