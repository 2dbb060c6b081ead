"""Which data rank owns which part of which parameter: a list, computed alike on every rank."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_ext.parallel.placement import Box, Placement, box_shape


@dataclass(frozen=True)
class OwnedBox:
    """A part of a parameter, in the coordinates of the whole parameter, that belongs to data rank ``owner``."""

    name: str
    box: Box
    owner: int


def assign(placements: Mapping[str, Placement], num_owners: int, whole_tensors: bool) -> list[OwnedBox]:
    """Divide what a rank holds over the data ranks that hold the same.

    Parameters that other ranks of the model hold too (norms under tensor parallelism, tied embeddings) are divided apart from the rest, by
    set of holders: so every holder finds the same owners, whatever else it holds, and owners of the same part have the same data rank.

    Args:
        placements: of the parameters of this rank, in the order of the model.
        num_owners: number of data ranks.
        whole_tensors: give parameters whole (``assign_whole``) rather than by rows (``assign_rows``).
    """
    rule = assign_whole if whole_tensors else assign_rows
    holders = dict.fromkeys(placement.replicas if len(placement.replicas) > 1 else () for placement in placements.values())
    owned: list[OwnedBox] = []
    for replicas in holders:
        together = {name: p.box for name, p in placements.items() if p.replicas == replicas or (not replicas and len(p.replicas) == 1)}
        owned += rule(together, num_owners)
    return owned


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


def assign_whole(boxes: Mapping[str, Box], num_owners: int) -> list[OwnedBox]:
    """Give each box to one rank: the largest first, to the rank with the fewest elements so far. Otherwise as ``assign_rows``."""
    loads = [0] * num_owners
    owners: dict[str, int] = {}
    for name in sorted(boxes, key=lambda name: -box_shape(boxes[name]).numel()):
        owners[name] = min(range(num_owners), key=loads.__getitem__)
        loads[owners[name]] += box_shape(boxes[name]).numel()
    return [OwnedBox(name, box, owners[name]) for name, box in boxes.items()]


def local(owned: OwnedBox, placement: Placement, tensor: torch.Tensor) -> torch.Tensor:
    """The owned part of a tensor that holds ``placement``'s box: rows of it, as a view."""
    if not owned.box:
        return tensor
    (start, stop), (first, _) = owned.box[0], placement.box[0]
    return tensor[start - first : stop - first]


def buckets(owned: Sequence[OwnedBox], dtypes: Mapping[str, torch.dtype], bucket_bytes: int) -> Iterator[list[OwnedBox]]:
    """Consecutive parts of the same owner and dtype, about ``bucket_bytes`` at a time: what one collective moves."""
    bucket: list[OwnedBox] = []
    filled = 0
    for part in owned:
        size = box_shape(part.box).numel() * dtypes[part.name].itemsize
        differs = bucket and (bucket[0].owner != part.owner or dtypes[bucket[0].name] != dtypes[part.name])
        if bucket and (differs or filled + size > bucket_bytes):
            yield bucket
            bucket, filled = [], 0
        bucket.append(part)
        filled += size
    if bucket:
        yield bucket
