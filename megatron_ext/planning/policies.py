"""Policies: the lengths of a step's documents in, a Plan out. Nothing downstream knows which policy made a plan."""

import heapq
from collections.abc import Callable, Sequence

from megatron_ext.errors import ConfigError
from megatron_ext.planning.cost_model import CostModel
from megatron_ext.planning.packing import best_fit_decreasing
from megatron_ext.planning.plan import Pack, Plan, Slice


def data_parallel(lengths: Sequence[int], devices: int, cost: CostModel) -> Plan:
    """Whole documents in best-fit packs; packs go, largest first, to the rank with the fewest tokens so far.

    Args:
        lengths: tokens of each document of the step.
        devices: number of data ranks.
        cost: what packs cost, and the most tokens of one.

    Raises:
        ConfigError: a document is longer than a pack.
    """
    tokens_per_pack = cost.tokens_per_rank
    longest = max(range(len(lengths)), key=lengths.__getitem__, default=None)
    if longest is not None and lengths[longest] > tokens_per_pack:
        raise ConfigError(f"document {longest} has {lengths[longest]} tokens; a pack holds {tokens_per_pack} (planning.tokens_per_pack)")
    bins = best_fit_decreasing(lengths, tokens_per_pack)
    bins.sort(key=lambda documents: -sum(lengths[d] for d in documents))
    loads = [(0, rank) for rank in range(devices)]
    packs = []
    for documents in bins:
        load, rank = heapq.heappop(loads)
        heapq.heappush(loads, (load + sum(lengths[d] for d in documents), rank))
        # Data order inside a pack: it costs nothing and makes a pack easy to read.
        packs.append(Pack(rank, 1, tuple(Slice(d, 0, lengths[d]) for d in sorted(documents))))
    return Plan(devices, tuple(packs))


POLICIES: dict[str, Callable[[Sequence[int], int, CostModel], Plan]] = {"data_parallel": data_parallel}


def plan_step(lengths: Sequence[int], devices: int, cost: CostModel, policy: str = "data_parallel", *, in_rounds: bool = False) -> Plan:
    """Plan one optimizer step.

    Args:
        lengths: tokens of each document of the step, in order.
        devices: number of data ranks.
        cost: what packs cost.
        policy: a key of ``POLICIES``.
        in_rounds: ranks wait for each other between packs: make a plan in rounds, at least one.

    Returns:
        A validated plan.

    Raises:
        ConfigError: an unknown policy, or documents that cannot be placed.
    """
    if policy not in POLICIES:
        raise ConfigError(f"planning.policy is {policy!r}; accepted: {', '.join(POLICIES)}")
    plan = POLICIES[policy](lengths, devices, cost)
    plan = plan.by_rounds(at_least=1) if in_rounds else plan
    plan.validate(lengths, cost.tokens_per_rank)
    return plan
