"""WLB-LLM: packs of variable length that are balanced by workload, on one static degree (Wang et al. 2025, OSDI'25, section 4)."""

import heapq
from collections.abc import Sequence

from megatron_ext.errors import ConfigError
from megatron_ext.planning.cost_model import CostModel
from megatron_ext.planning.peers.layout import Group, lay_out, longest_first, smallest_degrees, to_pack
from megatron_ext.planning.plan import Plan
from megatron_ext.planning.timeline import pack_seconds, timeline


def wlb(lengths: Sequence[int], devices: int, cost: CostModel, *, degree: int | None = None, in_rounds: bool = False) -> Plan:
    """Greedy variable-length packing: each document, longest first, into the pack of least workload that has room.

    Simplified: documents are never delayed to a later step, because all planners get the same documents: packs are added until all fit.
    Sharding within a pack divides heads, which is even, so that their choice between sharding by document and by pack has no counterpart.

    Args:
        lengths: tokens of each document of the step.
        devices: number of data ranks.
        cost: workload of documents and capacity of packs.
        degree: of all packs; None: the one that ``cost`` predicts to be fastest for this step, which favours WLB-LLM.
        in_rounds: of the plan.

    Raises:
        ConfigError: no degree, or not this one, holds the longest document.
    """
    degrees = cost.degrees(devices)
    if degree is not None and degree not in degrees:
        raise ConfigError(f"degree: {degree}; accepted: {', '.join(map(str, degrees))}")
    fewest = max(smallest_degrees(lengths, degrees if degree is None else [degree], cost), default=1)
    sizes = [size for size in degrees if (size >= fewest if degree is None else size == degree)]
    # As many packs as blocks, times a whole number, are even; fewer cost less besides.
    plans = [balanced(lengths, devices, cost, size, in_rounds, more) for size in sizes for more in sorted({devices // size, 1})]
    return min(plans, key=lambda plan: timeline(plan, pack_seconds(plan, cost)).seconds)


def balanced(lengths: Sequence[int], devices: int, cost: CostModel, degree: int, in_rounds: bool, more: int) -> Plan:
    """The plan with packs of one degree, the smallest multiple of ``more`` of them that holds the documents."""
    groups = devices // degree
    count = max(1, -(-sum(lengths) // (cost.capacity(degree) * more))) * more
    while (packs := fill(lengths, count, cost, degree)) is None:
        count += more
    ordered = sorted(packs, key=lambda entry: -entry[0])
    if in_rounds:
        # Packs of like workload at the same time.
        rounds = [[pack for _, pack in ordered[begin : begin + groups]] for begin in range(0, count, groups)]
        return lay_out(rounds, lengths, devices, cost, True)
    loads = [(0.0, place) for place in range(groups)]
    placed = []
    for seconds, pack in ordered:
        load, place = heapq.heappop(loads)
        heapq.heappush(loads, (load + seconds + cost.per_pack, place))
        placed.append(to_pack(place * degree, pack, lengths, cost))
    return Plan(devices, tuple(pack for pack in placed if pack.slices))


def fill(lengths: Sequence[int], count: int, cost: CostModel, degree: int) -> list[tuple[float, Group]] | None:
    """``count`` packs with their workloads, of attention and of all that is linear in tokens; None where the documents do not fit.

    Algorithm 1.
    """
    packs = [Group(degree) for _ in range(count)]
    work, tokens = [0.0] * count, [0] * count
    each = (cost.work(lengths) / degree + cost.exchange_seconds(lengths, degree)).tolist()
    for document in longest_first(lengths):
        fitting = [pack for pack in range(count) if tokens[pack] + lengths[document] <= cost.capacity(degree)]
        if not fitting:
            return None
        pack = min(fitting, key=work.__getitem__)
        packs[pack].documents.append(document)
        work[pack] += each[document]
        tokens[pack] += lengths[document]
    return list(zip(work, packs, strict=True))
