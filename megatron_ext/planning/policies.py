"""Policies: the lengths of a step's documents in, a Plan out. Nothing downstream knows which policy made a plan."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_ext.errors import ConfigError
from megatron_ext.planning.adaptive import adaptive, static_assignment
from megatron_ext.planning.assignment import Assignment
from megatron_ext.planning.bounds import area_bound
from megatron_ext.planning.cost_model import CostModel
from megatron_ext.planning.plan import Plan
from megatron_ext.planning.static import static
from megatron_ext.planning.step import Step

MARGIN = 0.02
"""Share of the best static plan's seconds that the adaptive policy has to gain: predictions are no better than that."""


@dataclass(frozen=True)
class Choice:
    """What a user says about plans, for policies that read it."""

    degree: int | None
    margin: float


@dataclass(frozen=True)
class Planned:
    """A plan and what is predicted of it. Seconds are without ``CostModel.per_step``, which every plan costs."""

    plan: Plan
    policy: str
    """That made it: ``best_static`` where the adaptive policy gained too little."""
    seconds: float
    bound: float
    """No plan takes less: :func:`lower_bound`."""
    static_seconds: float
    """Of the best static plan."""


def _data_parallel(step: Step, choice: Choice) -> tuple[Assignment, str]:
    return static(step, 1, even=False), "data_parallel"


def _static(step: Step, choice: Choice) -> tuple[Assignment, str]:
    if choice.degree is None:
        raise ConfigError(f"planning.degree is null; accepted with planning.policy=static: {', '.join(map(str, step.degrees))}")
    return static(step, choice.degree), "static"


def _best_static(step: Step, choice: Choice) -> tuple[Assignment, str]:
    return static_assignment(step), "best_static"


def _adaptive(step: Step, choice: Choice) -> tuple[Assignment, str]:
    return adaptive(step, choice.margin)


POLICIES: dict[str, Callable[[Step, Choice], tuple[Assignment, str]]] = {
    "adaptive": _adaptive,
    "best_static": _best_static,
    "data_parallel": _data_parallel,
    "static": _static,
}


def plan_step(
    lengths: Sequence[int],
    devices: int,
    cost: CostModel,
    policy: str = "adaptive",
    *,
    degree: int | None = None,
    largest_degree: int | None = None,
    in_rounds: bool = False,
    margin: float = MARGIN,
) -> Plan:
    """Plan one optimizer step. A pure function: the same arguments give the same plan everywhere.

    Args:
        lengths: tokens of each document of the step, in order.
        devices: number of data ranks; any number.
        cost: what packs cost, and the most tokens of one.
        policy: ``adaptive``: blocks of different degrees, planned together for the whole step; ``best_static``: the one degree of least
            predicted seconds; ``static``: ``degree``; ``data_parallel``: packs of single ranks, as full as they can be.
        degree: of ``static``.
        largest_degree: most ranks of a block; None: those that attention heads can be divided over.
        in_rounds: ranks wait for each other between packs: make a plan in rounds, at least one.
        margin: share of the best static plan's seconds that ``adaptive`` has to gain, or it returns that plan.

    Returns:
        A validated plan.

    Raises:
        ConfigError: an unknown policy or degree, or a document that fits no block.
    """
    assignment, _, step = _assign(lengths, devices, cost, policy, Choice(degree, margin), largest_degree, in_rounds)
    return assignment.plan(step)


def plan_and_compare(
    lengths: Sequence[int],
    devices: int,
    cost: CostModel,
    policy: str = "adaptive",
    *,
    degree: int | None = None,
    largest_degree: int | None = None,
    in_rounds: bool = False,
    margin: float = MARGIN,
) -> Planned:
    """As :func:`plan_step`, with the predicted seconds of the plan, of the best static plan, and a bound on those of every plan."""
    assignment, made_by, step = _assign(lengths, devices, cost, policy, Choice(degree, margin), largest_degree, in_rounds)
    seconds = assignment.seconds(step)
    static_seconds = seconds if made_by == "best_static" else static_assignment(step, compiled=made_by == "adaptive").seconds(step)
    return Planned(assignment.plan(step), made_by, seconds, area_bound(step), static_seconds)


def _assign(
    lengths: Sequence[int], devices: int, cost: CostModel, policy: str, choice: Choice, largest_degree: int | None, in_rounds: bool
) -> tuple[Assignment, str, Step]:
    if policy not in POLICIES:
        raise ConfigError(f"planning.policy is {policy!r}; accepted: {', '.join(POLICIES)}")
    step = Step.of(lengths, devices, cost, largest_degree, in_rounds)
    return *POLICIES[policy](step, choice), step
