"""Policies: the lengths of a step's documents in, a Plan out. Nothing downstream knows which policy made a plan."""

import heapq
from collections.abc import Callable, Sequence

from megatron_ext.errors import ConfigError
from megatron_ext.planning.packing import best_fit_decreasing
from megatron_ext.planning.plan import Pack, Plan, Slice


def data_parallel(lengths: Sequence[int], devices: int, tokens_per_pack: int) -> Plan:
    """Whole documents in best-fit packs; packs go, largest first, to the rank with the fewest tokens so far.

    Args:
        lengths: tokens of each document of the step.
        devices: number of data ranks.
        tokens_per_pack: most tokens that a rank computes at once.

    Raises:
        ConfigError: a document is longer than ``tokens_per_pack``.
    """
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


POLICIES: dict[str, Callable[[Sequence[int], int, int], Plan]] = {"data_parallel": data_parallel}


def plan_step(lengths: Sequence[int], devices: int, *, tokens_per_pack: int, policy: str = "data_parallel") -> Plan:
    """Plan one optimizer step.

    Args:
        lengths: tokens of each document of the step, in order.
        devices: number of data ranks.
        tokens_per_pack: most tokens that one rank computes at once.
        policy: a key of ``POLICIES``.

    Returns:
        A validated plan.

    Raises:
        ConfigError: an unknown policy, or documents that cannot be placed.
    """
    if policy not in POLICIES:
        raise ConfigError(f"planning.policy is {policy!r}; accepted: {', '.join(POLICIES)}")
    plan = POLICIES[policy](lengths, devices, tokens_per_pack)
    plan.validate(lengths, tokens_per_pack)
    return plan
