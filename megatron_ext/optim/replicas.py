"""Do ranks that must hold the same values hold the same values?"""

from collections.abc import Mapping

import torch

from megatron_ext.errors import ReplicaError
from megatron_ext.parallel.grid import Grid
from megatron_ext.parallel.group import MAX, MIN, Group
from megatron_ext.parallel.placement import Placement

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**22


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """Two sums over the bits of ``tensor``, the second weighted by place, modulo 2^64: int64 [2]. Any changed value changes the first."""
    bits = tensor.detach().reshape(-1).view(_BITS[tensor.element_size()])
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for number, chunk in enumerate(bits.split(_CHUNK)):
        wide = chunk.to(torch.int64)
        places = torch.arange(1 + number * _CHUNK, 1 + number * _CHUNK + len(wide), device=tensor.device)
        total += torch.stack((wide.sum(), (wide * places).sum()))
    return total


def check_replicas(parameters: Mapping[str, torch.Tensor], placements: Mapping[str, Placement], grid: Grid) -> None:
    """Compare the parameters of all ranks that must hold the same. All ranks call it and all raise. Sends 16 bytes a parameter, few times.

    Raises:
        ReplicaError: names the first parameter that differs, and the ranks by what they hold.
    """
    digests = {name: digest(parameter) for name, parameter in parameters.items()}
    differing = _differing(list(digests), digests, grid.dp)
    for replicas in sorted({p.replicas for p in placements.values() if len(p.replicas) > 1}):
        names = [name for name in digests if placements[name].replicas == replicas]
        differing += _differing(names, digests, grid.group("replicas", replicas))
    found = [name for names in grid.world.gather(differing) for name in names]
    if found:
        raise ReplicaError(_report(found[0], digests, placements, grid))


def _differing(names: list[str], digests: Mapping[str, torch.Tensor], group: Group) -> list[str]:
    if group.size == 1 or not names:
        return []
    mine = torch.stack([digests[name] for name in names])
    same = (group.all_reduce(mine.clone(), MAX) == group.all_reduce(mine.clone(), MIN)).all(1).tolist()
    return [name for name, equal in zip(names, same, strict=True) if not equal]


def _report(name: str, digests: Mapping[str, torch.Tensor], placements: Mapping[str, Placement], grid: Grid) -> str:
    mine = [placements[name].box, digests[name].tolist()] if name in digests else None
    ranks_by_value: dict[str, list[int]] = {}
    for rank, value in enumerate(grid.world.gather(mine)):
        if value is not None:
            ranks_by_value.setdefault(str(value), []).append(rank)
    holders = " from ".join(f"ranks {ranks}" for ranks in ranks_by_value.values())
    return f"{name} differs between ranks that must hold the same: {holders}. A device or a network changed bits, or updates differed"
