"""The grid of a run on the hosts that remain."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from megatron_ext.config import RunConfig
from megatron_ext.errors import ConfigError
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.parallel_limits import check_divides
from megatron_ext.parallel.grid import GridShape
from megatron_ext.train.build import run_shape

RULE = (
    "tp and pp as configured if they fit, dp what is left; else tp x pp nearest to what is configured, then most ranks, "
    "then tp nearest to what is configured"
)


@dataclass(frozen=True)
class Layout:
    """A grid and the hosts that it lies on."""

    shape: GridShape
    ranks: dict[str, int]
    """Of each host, in order of ranks; hosts without ranks are left out."""
    overrides: tuple[str, ...] = ()
    """What the configuration must say otherwise for this grid."""

    def __str__(self) -> str:
        return f"{self.shape} on " + ", ".join(f"{host}:{count}" for host, count in self.ranks.items())


def choose_grid(configure: Callable[[list[str]], RunConfig], model: ModelConfig, slots: Mapping[str, int]) -> Layout:
    """The grid for the ranks that hosts have room for, by ``RULE``. The tokens of a step stay, so the training is the same.

    Args:
        configure: the run's configuration with further overrides; raises ConfigError where they cannot be.
        model: its model.
        slots: ranks that each host has room for.

    Raises:
        ConfigError: no grid fits; says why the last one that was tried does not.
    """
    reason = "there is no host"
    for tp, pp in _by_preference(configure([]), sum(slots.values())):
        ranks = _place(slots, tp, pp)
        if not ranks:
            continue
        overrides = _overrides(configure([]), model, tp, pp, sum(ranks.values()))
        try:
            config = configure(overrides)
            check_divides(model, config.parallel)
            return Layout(run_shape(config, model, sum(ranks.values())), ranks, tuple(overrides))
        except ConfigError as error:
            reason = str(error)
    raise ConfigError(f"no grid fits {sum(slots.values())} ranks on {len(slots)} hosts: {reason}")


def _by_preference(config: RunConfig, room: int) -> Iterator[tuple[int, int]]:
    """Every (tp, pp) that so many ranks have room for, best first."""
    tp, pp = config.parallel.tp, config.parallel.pp
    candidates = [(t, p) for t in range(1, room + 1) for p in range(1, room // t + 1)]

    def cost(candidate: tuple[int, int]) -> tuple[float, ...]:
        t, p = candidate
        return (candidate != (tp, pp), abs(math.log2(t * p / (tp * pp))), -(room // (t * p) * t * p), abs(math.log2(t / tp)), t)

    yield from sorted(candidates, key=cost)


def _place(slots: Mapping[str, int], tp: int, pp: int) -> dict[str, int]:
    """Ranks of each host: whole tensor-parallel lines, unless no host has room for one; as many as a multiple of tp pp."""
    whole = {host: count // tp * tp for host, count in slots.items()}
    room = whole if sum(whole.values()) >= tp * pp else dict(slots)
    left = sum(room.values()) // (tp * pp) * tp * pp
    placed = {}
    for host, count in room.items():
        placed[host] = min(count, left)
        left -= placed[host]
    return {host: count for host, count in placed.items() if count}


def _overrides(config: RunConfig, model: ModelConfig, tp: int, pp: int, ranks: int) -> list[str]:
    """What must be said otherwise than in ``config`` for so many ranks. Sharing packs in smaller blocks changes no loss."""
    was, overrides = config.parallel, []
    if tp != was.tp:
        overrides.append(f"parallel.tp={tp}")
        if tp == 1 and was.sequence_parallel_activations:
            overrides.append("parallel.sequence_parallel_activations=false")
    if pp != was.pp:
        overrides.append(f"parallel.pp={pp}")
        if was.layers_per_stage is not None:
            overrides.append("parallel.layers_per_stage=null")
    most = max(1, min(ranks // (tp * pp), model.num_heads // tp))
    if config.planning.degree is not None and config.planning.degree > most:
        overrides.append(f"planning.degree={1 << (most.bit_length() - 1)}")
    return overrides
