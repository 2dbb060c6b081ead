"""The grid of ranks: pipeline x data x tensor, and every group that its lines make."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

import torch.distributed as dist

from megatron_ext.errors import ConfigError
from megatron_ext.parallel.group import PACK_AXES, Group, Traffic
from megatron_ext.parallel.options import ParallelOptions
from megatron_ext.parallel.world import World


@dataclass(frozen=True)
class GridShape:
    """Sizes of the axes. Rank (p dp + d) tp + t is stage p, data rank d, tensor rank t: tensor-parallel neighbours share a host."""

    pp: int
    dp: int
    tp: int

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.pp * self.dp * self.tp

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(pp, dp, tp) of a rank."""
        return rank // (self.dp * self.tp), rank // self.tp % self.dp, rank % self.tp

    def rank(self, pp: int, dp: int, tp: int) -> int:
        """The rank at these coordinates."""
        return (pp * self.dp + dp) * self.tp + tp

    def __str__(self) -> str:
        return f"pp {self.pp} x dp {self.dp} x tp {self.tp}"


def grid_shape(options: ParallelOptions, world_size: int) -> GridShape:
    """The grid of ``world_size`` ranks.

    Raises:
        ConfigError: tp pp does not divide the ranks; names the key and the sizes that would.
    """
    model_ranks = options.tp * options.pp
    if world_size % model_ranks:
        fits = [f"tp {tp} pp {pp}" for tp in _divisors(world_size) for pp in _divisors(world_size // tp)]
        raise ConfigError(
            f"parallel.tp is {options.tp} and parallel.pp is {options.pp}: {model_ranks} ranks hold a model, which does not divide the "
            f"{world_size} ranks of this run; accepted: {', '.join(fits[:24])}{' ...' if len(fits) > 24 else ''}"
        )
    return GridShape(options.pp, world_size // model_ranks, options.tp)


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


@dataclass(frozen=True)
class Grid:
    """The grid as one rank sees it: its coordinates and the groups along its lines. Passed down, never global.

    A rank creates only the groups that it belongs to (``use_local_synchronization``), but every rank as many as every other, alone where
    it has no others: torch 2.13 names such a group after the number of groups that its member has, and members that disagree about the
    name wait for each other forever. So all ranks ask for new groups in one order, and groups of a kind are made for all ranks at once;
    and none is given back before the process ends, because the next would get its name and meet what it left in the store.

    Args:
        world: the ranks.
        shape: sizes of the axes.
        kv_copies: tensor-parallel neighbours that hold the same key/value head.
    """

    world: World
    shape: GridShape
    kv_copies: int = 1
    traffic: Traffic = field(default_factory=Traffic)
    _divisions: dict[tuple[bool, tuple[int, ...]], Group] = field(default_factory=dict, repr=False)
    """This rank's group of every division of the world: by whether it is for packs, and by the first rank of each rank's group."""

    def __post_init__(self) -> None:
        assert self.shape.size == self.world.size, "the shape was made for this world"
        self._divide("tp", lambda p, d, t: (p, d))
        self._divide("dp", lambda p, d, t: (p, t))
        self._divide("pp", lambda p, d, t: (d, t))
        self._divide("ends", lambda p, d, t: (d, t, p if 0 < p < self.shape.pp - 1 else None))
        self._divide("kv", lambda p, d, t: (p, d, t // self.kv_copies))

    @property
    def stage(self) -> int:
        """This rank's pipeline stage."""
        return self.shape.coordinates(self.world.rank)[0]

    @property
    def is_first_stage(self) -> bool:
        """True where tokens are embedded."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """True where the loss is computed."""
        return self.stage == self.shape.pp - 1

    @property
    def pp(self) -> Group:
        """The stages that this rank's activations pass."""
        _, d, t = self.shape.coordinates(self.world.rank)
        return self.group("pp", tuple(self.shape.rank(p, d, t) for p in range(self.shape.pp)))

    @property
    def dp(self) -> Group:
        """The ranks that hold the same part of the model and compute other packs."""
        p, _, t = self.shape.coordinates(self.world.rank)
        return self.group("dp", tuple(self.shape.rank(p, d, t) for d in range(self.shape.dp)))

    @property
    def tp(self) -> Group:
        """The ranks that hold the other parts of this rank's matrices."""
        p, d, _ = self.shape.coordinates(self.world.rank)
        return self.group("tp", tuple(self.shape.rank(p, d, t) for t in range(self.shape.tp)))

    def block(self, degree: int) -> Group | None:
        """The aligned block of ``degree`` data ranks, a power of two, that this rank is in; None where dp ends before the block does.

        All ranks ask for a degree when any of them does; it is made when they first do. Over all degrees there are 2 dp - 1 blocks on each
        line if dp is a power of two, and each rank is in log2 dp + 1 of them.
        """
        assert degree & (degree - 1) == 0, "blocks are powers of two"
        full = self.shape.dp // degree * degree
        block = self._divide("block", lambda p, d, t: (p, t, d // degree if d < full else -1 - d))
        return block if block.size == degree else None

    def ring(self, degree: int, size: int) -> Group | None:
        """The ``size`` ranks of this rank's ``block(degree)`` that have its place among the ``degree / size`` neighbours; as ``block``."""
        full, neighbours = self.shape.dp // degree * degree, degree // size
        ring = self._divide("ring", lambda p, d, t: (p, t, d // degree, d % neighbours) if d < full else (p, t, -1 - d, 0))
        return ring if ring.size == size else None

    def group(self, axis: str, ranks: tuple[int, ...]) -> Group:
        """The existing group of ``ranks``, this one included, whose traffic is to be counted under ``axis``."""
        return next(replace(group, axis=axis) for (packs, _), group in self._divisions.items() if group.ranks == ranks and not packs)

    def _divide(self, axis: str, key: Callable[[int, int, int], Hashable]) -> Group:
        """Divide the world into groups of ranks whose coordinates (pp, dp, tp) have equal keys; returns this rank's.

        Packs have groups of their own, even where a line of the grid has the same ranks: ranks that share one pack need not share the
        next, and so meet in packs and in the reduction of gradients, which goes on beside, in different orders.
        """
        keys = [key(*self.shape.coordinates(rank)) for rank in range(self.world.size)]
        division = (axis in PACK_AXES, tuple(keys.index(each) for each in keys))
        ranks = tuple(rank for rank, first in enumerate(division[1]) if first == division[1][self.world.rank])
        if division not in self._divisions:
            anyone_has_others = len(set(keys)) < self.world.size
            handle = dist.new_group(list(ranks), use_local_synchronization=True) if anyone_has_others else None
            place = ranks.index(self.world.rank)
            self._divisions[division] = Group(axis, ranks, place, handle, self.traffic, self.world.activity)
        return self._divisions[division]
