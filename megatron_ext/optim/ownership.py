"""Which rank owns which rows of which parameter: a list, computed alike on every rank."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class OwnedRows:
    """Rows ``start`` to ``stop`` (exclusive, along dimension 0) of a parameter belong to rank ``owner``."""

    name: str
    start: int
    stop: int
    owner: int


def assign_rows(shapes: Mapping[str, torch.Size], num_owners: int) -> list[OwnedRows]:
    """Give each rank one contiguous stretch of the parameters, laid end to end, of nearly equal size.

    For element-wise rules, which may cut a tensor anywhere: borders fall between rows, so a rank's share differs from the mean by less
    than one row. A parameter without dimensions counts as one row.

    Args:
        shapes: parameters in the order of the model.
        num_owners: number of ranks.

    Returns:
        Entries in the order of the parameters; every row of every parameter is in exactly one.
    """
    total = sum(shape.numel() for shape in shapes.values())
    owned: list[OwnedRows] = []
    before = 0
    for name, shape in shapes.items():
        rows = shape[0] if len(shape) else 1
        row_size = shape.numel() // rows
        # A row goes to the rank in whose stretch its first element lies.
        first_owner = _owner(before, total, num_owners)
        start = 0
        for owner in range(first_owner, num_owners):
            border = -(-total * (owner + 1) // num_owners) - before
            stop = min(rows, -(-border // row_size))
            if stop > start:
                owned.append(OwnedRows(name, start, stop, owner))
                start = stop
            if start == rows:
                break
        before += shape.numel()
    return owned


def _owner(element: int, total: int, num_owners: int) -> int:
    return min(num_owners - 1, element * num_owners // total)
