"""From groups of ranks of any order to a plan of aligned blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_ext.errors import ConfigError
from megatron_ext.planning.cost_model import CostModel
from megatron_ext.planning.plan import Pack, Plan, Slice


@dataclass
class Group:
    """Ranks that compute documents together, not yet at a place."""

    degree: int
    documents: list[int] = field(default_factory=list)


def to_pack(first_rank: int, group: Group, lengths: Sequence[int], cost: CostModel) -> Pack:
    """The group at a place."""
    slices = tuple(Slice(document, 0, lengths[document]) for document in sorted(group.documents))
    return Pack(first_rank, group.degree, slices, cost.ring_of(group.degree))


def lay_out(micro_batches: Sequence[Sequence[Group]], lengths: Sequence[int], devices: int, cost: CostModel, in_rounds: bool) -> Plan:
    """Place the groups of each micro-batch on neighbouring ranks, largest first.

    Sizes are powers of two, so that what lies before a group is a multiple of its size: blocks are aligned. A micro-batch is a round; where
    the plan is not in rounds, ranks without documents in one go on to the next.

    Args:
        micro_batches: groups of each, of at most ``devices`` ranks together.
        lengths: tokens of each document.
        devices: number of data ranks.
        cost: says which blocks need a ring.
        in_rounds: of the plan.
    """
    packs = []
    for groups in micro_batches:
        first_rank = 0
        for group in sorted((group for group in groups if group.documents), key=lambda group: -group.degree):
            packs.append(to_pack(first_rank, group, lengths, cost))
            first_rank += group.degree
        assert first_rank <= devices, "groups of a micro-batch fit on the ranks"
        if in_rounds:
            packs += [Pack(rank, 1, ()) for rank in range(first_rank, devices)]
    return Plan(devices, tuple(packs), in_rounds).by_rounds(at_least=1) if in_rounds else Plan(devices, tuple(packs))


def smallest_degrees(lengths: Sequence[int], degrees: Sequence[int], cost: CostModel) -> list[int]:
    """For each document the fewest ranks that hold it.

    Raises:
        ConfigError: the largest degree does not hold a document.
    """
    found = []
    for document, length in enumerate(lengths):
        fitting = [degree for degree in degrees if length <= cost.capacity(degree)]
        if not fitting:
            raise ConfigError(f"document {document} has {length} tokens; {degrees[-1]} ranks hold {cost.capacity(degrees[-1])}")
        found.append(fitting[0])
    return found


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Numbers of documents, longest first; equal lengths keep their order."""
    return sorted(range(len(lengths)), key=lambda document: -lengths[document])
