"""Where adapting the degree pays: the best static degree over adaptive, on machines and documents that differ from those given.

Static is the better of two packers, each with the best degree for the step: best-fit (``best_static``) and balanced by work (``wlb``).
"""

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from megatron_ext.errors import ConfigError
from megatron_ext.planning.cost_model import Curve
from megatron_ext.planning.judge import judge
from megatron_ext.planning.lengths import with_tail_weight
from megatron_ext.planning.simulator import Machine, draw_batches, planner_of

LINKS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
GROUPED = (1, 2, 8)
MEMORY = (0.5, 1.0, 2.0, 4.0)
TAILS = (0.8, 1.0, 1.2)


@dataclass(frozen=True)
class Base:
    """What is varied."""

    machine: Machine
    population: NDArray[np.integer]
    documents: int
    longest: int
    batches: int
    seed: int


@dataclass(frozen=True)
class Cell:
    """Factors on what is given."""

    links: float
    """On the speed of exchanges."""
    grouped: int
    """Query heads for each key/value head, relative to the model's."""
    memory: float
    """On the tokens that a rank holds."""
    tail: float
    """Exponent on the lengths above the 95th percentile, relative to it."""


@dataclass(frozen=True)
class Surface:
    """Means, over batches, of judged seconds over those of adaptive; NaN where a cell has no plan."""

    cell: Cell
    best_fit: float
    """Of ``best_static``."""
    balanced: float
    """Of ``wlb``."""
    ratio: float
    """Of the better of both."""


def cells() -> list[Cell]:
    """All combinations."""
    return [Cell(*each) for each in product(LINKS, GROUPED, MEMORY, TAILS)]


def evaluate(base: Base, cell: Cell) -> Surface:
    """Plan and judge the batches of one cell. Documents that the largest block no longer holds are left out."""
    machine = varied(base.machine, cell)
    largest = machine.cost.capacity(machine.cost.degrees(machine.devices)[-1])
    population = with_tail_weight(base.population, cell.tail)
    rng = np.random.default_rng(base.seed)
    batches, _ = draw_batches(population, base.documents, base.batches, min(base.longest, largest), rng)
    truth = machine.truth(0.0, (base.seed,))
    seconds = []
    for lengths in batches:
        try:
            plans = [planner_of(name, machine)(lengths)[0] for name in ("best_static", "wlb", "adaptive")]
        except ConfigError:
            return Surface(cell, *[float("nan")] * 3)
        seconds.append([judge(plan, lengths, truth).seconds for plan in plans])
    static, balanced, adaptive = np.array(seconds).T
    best_fit, other, both = ((each / adaptive).mean() for each in (static, balanced, np.minimum(static, balanced)))
    return Surface(cell, float(best_fit), float(other), float(both))


def varied(machine: Machine, cell: Cell) -> Machine:
    """The machine with the factors of a cell."""
    cost, memory = machine.cost, machine.memory
    heads = max(1, cost.attention.kv_heads // cell.grouped)
    limit = memory.states + (memory.limit - memory.states) * cell.memory
    memory = replace(memory, limit=limit)
    cost = replace(
        cost,
        tokens_per_rank=memory.tokens_per_rank,
        attention=replace(cost.attention, kv_heads=heads),
        all_to_all=tuple(Curve(curve.bytes, tuple(second / cell.links for second in curve.seconds)) for curve in cost.all_to_all),
    )
    return replace(machine, cost=cost, memory=memory)
