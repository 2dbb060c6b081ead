"""Which data rank owns which part of which parameter: a list, computed alike on every rank."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_ext.optim.rules import Rule
from megatron_ext.parallel.placement import Box, Placement, box_shape


@dataclass(frozen=True)
class OwnedBox:
    """A part of a parameter, in the coordinates of the whole parameter, that belongs to data rank ``owner``."""

    name: str
    box: Box
    owner: int
    meets_on: int | None = None
    """The tensor-parallel rank of ``owner`` on which the parts of all tensor-parallel ranks are put together; None: they are not."""


def assign(placements: Mapping[str, Placement], rules: Mapping[str, Rule], num_owners: int, tensor_ranks: int = 1) -> list[OwnedBox]:
    """Divide what a rank holds over the data ranks that hold the same.

    Parameters that other ranks of the model hold too (norms under tensor parallelism, tied embeddings) are divided apart from the rest, by
    set of holders: so every holder finds the same owners, whatever else it holds, and owners of the same part have the same data rank.

    Args:
        placements: of the parameters of this rank, in the order of the model.
        rules: of the parameters; their ``share`` says how a parameter may be divided.
        num_owners: number of data ranks.
        tensor_ranks: number of tensor-parallel ranks.

    Returns:
        Parts in the order of the parameters.
    """
    holders = dict.fromkeys(placement.replicas if len(placement.replicas) > 1 else () for placement in placements.values())
    owned: list[OwnedBox] = []
    for replicas in holders:
        together = {name: p for name, p in placements.items() if p.replicas == replicas or (not replicas and len(p.replicas) == 1)}
        by_rows = {name: placement.box for name, placement in together.items() if rules[name].share == "rows"}
        whole = {name: placement for name, placement in together.items() if name not in by_rows}
        owned += assign_rows(by_rows, num_owners)
        owned += assign_whole(whole, rules, num_owners, tensor_ranks)
    order = {name: number for number, name in enumerate(placements)}
    return sorted(owned, key=lambda part: order[part.name])


def assign_rows(boxes: Mapping[str, Box], num_owners: int) -> list[OwnedBox]:
    """Give each rank one contiguous stretch of the parameters, laid end to end, of nearly equal size.

    For element-wise rules, which may cut a tensor anywhere: borders fall between rows, so a rank's share differs from the mean by less
    than one row. A parameter without dimensions counts as one row.

    Args:
        boxes: what there is of each parameter, in the order of the model.
        num_owners: number of ranks.

    Returns:
        Entries in the order of the parameters; every row of every box is in exactly one.
    """
    total = sum(box_shape(box).numel() for box in boxes.values())
    owned: list[OwnedBox] = []
    before = 0
    for name, box in boxes.items():
        size = box_shape(box).numel()
        owned += [OwnedBox(name, part, owner) for part, owner in _stretches(box, before, total, num_owners)]
        before += size
    return owned


def _stretches(box: Box, before: int, total: int, num_owners: int) -> Iterator[tuple[Box, int]]:
    """The blocks of rows of ``box``, which begins at element ``before`` of ``total``, with their owners."""
    first, last = box[0] if box else (0, 1)
    row_size = box_shape(box).numel() // (last - first)
    start = 0
    # A row goes to the rank in whose stretch its first element lies.
    for owner in range(min(num_owners - 1, before * num_owners // total), num_owners):
        border = -(-total * (owner + 1) // num_owners) - before
        stop = min(last - first, -(-border // row_size))
        if stop > start:
            yield ((first + start, first + stop), *box[1:]) if box else (), owner
            start = stop


def assign_whole(placements: Mapping[str, Placement], rules: Mapping[str, Rule], num_owners: int, tensor_ranks: int = 1) -> list[OwnedBox]:
    """Give each parameter to one rank: the costliest first, to the rank with the least to do so far (Graham 1969: at most 4/3 of the best).

    What the cost is, the rule of a parameter says, by the shape of the whole parameter: so all tensor-parallel ranks find the same
    owners. A rule that sees whole parameters takes turns among the tensor-parallel ranks too. Otherwise as ``assign_rows``.
    """
    loads = {(owner, tensor_rank): 0.0 for tensor_rank in range(tensor_ranks) for owner in range(num_owners)}
    slots: dict[str, tuple[int, int | None]] = {}
    costs = {name: rules[name].cost(placement.shape) for name, placement in placements.items()}
    for name in sorted(placements, key=lambda name: -costs[name]):
        if rules[name].share == "whole" and tensor_ranks > 1:
            slot = min(loads, key=loads.__getitem__)
            slots[name], loads[slot] = slot, loads[slot] + costs[name]
        else:
            owner = min(range(num_owners), key=lambda owner: sum(loads[owner, t] for t in range(tensor_ranks)))
            slots[name] = owner, None
            for tensor_rank in range(tensor_ranks):
                loads[owner, tensor_rank] += costs[name] / tensor_ranks
    return [OwnedBox(name, placement.box, *slots[name]) for name, placement in placements.items()]


def local(owned: OwnedBox, placement: Placement, tensor: torch.Tensor) -> torch.Tensor:
    """The owned part of a tensor that holds ``placement``'s box: rows of it, as a view."""
    if not owned.box:
        return tensor
    (start, stop), (first, _) = owned.box[0], placement.box[0]
    return tensor[start - first : stop - first]


def buckets(owned: Sequence[OwnedBox], dtypes: Mapping[str, torch.dtype], bucket_bytes: int) -> list[list[OwnedBox]]:
    """Parts of the same owner and dtype, about ``bucket_bytes`` at a time: what one collective moves.

    ``owned`` is in the order of the model, and so are the parts of a bucket; buckets are in the order in which backward, which begins
    at the end of the model, completes them.
    """
    complete: list[list[OwnedBox]] = []
    filling: dict[tuple[int, torch.dtype], list[OwnedBox]] = {}
    for part in reversed(owned):
        key = part.owner, dtypes[part.name]
        bucket = filling.get(key, [])
        if bucket and sum(_bytes(each, dtypes) for each in (part, *bucket)) > bucket_bytes:
            complete.append(filling.pop(key))
        filling.setdefault(key, []).insert(0, part)
    return complete + list(filling.values())


def _bytes(part: OwnedBox, dtypes: Mapping[str, torch.dtype]) -> int:
    return box_shape(part.box).numel() * dtypes[part.name].itemsize
