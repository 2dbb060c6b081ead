"""The grid of ranks: pipeline x data x tensor, and every group that its lines make."""

from dataclasses import dataclass, field

import torch.distributed as dist

from megatron_ext.errors import ConfigError
from megatron_ext.parallel.group import Group, Traffic
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
    """The grid as one rank sees it: its coordinates and the groups along its lines. Passed down, never global."""

    world: World
    shape: GridShape
    traffic: Traffic = field(default_factory=Traffic)
    _groups: dict[tuple[str, tuple[int, ...]], Group] = field(default_factory=dict, repr=False)
    """Groups of this rank that exist, by axis and ranks."""

    def __post_init__(self) -> None:
        """Make the groups of the axes at once, in one order on all ranks: two that waited for different groups would wait forever."""
        assert self.shape.size == self.world.size, "the shape was made for this world"
        for group in (self.tp, self.dp, self.pp):
            assert self.world.rank in group.ranks

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

    def block(self, first: int, degree: int) -> Group:
        """Data ranks ``first`` to ``first + degree`` of this rank's line: a power of two of them, aligned, this rank included."""
        aligned = degree & (degree - 1) == 0 and first % degree == 0 and first + degree <= self.shape.dp
        assert aligned, "the plan has aligned power-of-two blocks"
        p, _, t = self.shape.coordinates(self.world.rank)
        return self.group("block", tuple(self.shape.rank(p, d, t) for d in range(first, first + degree)))

    def group(self, axis: str, ranks: tuple[int, ...]) -> Group:
        """The group of ``ranks``, this one included. All of them must ask for it; it is made when they first do."""
        if (axis, ranks) not in self._groups:
            handle = None if len(ranks) == 1 else dist.new_group(list(ranks), use_local_synchronization=True)
            self._groups[axis, ranks] = Group(axis, ranks, ranks.index(self.world.rank), handle, self.traffic)
        return self._groups[axis, ranks]


def blocks_of(data_rank: int, dp: int) -> list[tuple[int, int]]:
    """(first data rank, degree) of every full aligned power-of-two block of ``dp`` data ranks that contains ``data_rank``."""
    degrees = [1 << power for power in range(dp.bit_length())]
    blocks = [(data_rank // degree * degree, degree) for degree in degrees]
    return [(first, degree) for first, degree in blocks if first + degree <= dp]
