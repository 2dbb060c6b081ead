"""Instruments of a run: now and then, what happens inside the model, the same whatever ranks compute it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from megatron_ext.config import RunConfig
from megatron_ext.model.channel_statistics import floor_centred, floor_released
from megatron_ext.model.gpt import GPT
from megatron_ext.model.probes import MEASURES, ProbeTables, norm_names, watched
from megatron_ext.optim.sharded import ShardedOptimizer
from megatron_ext.parallel.grid import Grid
from megatron_ext.train.zero import ZeroOptimizer

_OF_BLOCK = re.compile(r"model\.layers\.(\d+)\.")


class Reading:
    """What was seen in one step, on every rank. Empty until the step has ended."""

    def __init__(self) -> None:
        self.record: dict[str, Any] = {}
        """What metrics.jsonl says of it: see ``report.records.ProbeRecord``."""

    def events(self) -> list[tuple[str, float]]:
        """Names and values for monitors: means over depth of kurtosis at each site, gradients, sinks and logits, where known."""
        by_depth = {f"kurtosis/{site}": measures["kurtosis_released"] for site, measures in self.record["sites"].items()}
        by_depth |= {name: self.record[name] for name in ("parameter_gradient_norm", "sink_mass", "max_logit")}
        known = {name: [value for value in values if value is not None] for name, values in by_depth.items()}
        return [(f"probe/{name}", sum(values) / len(values)) for name, values in known.items() if values]


class Probes:
    """Watches single steps of a run. All ranks make one.

    Args:
        model: this rank's part.
        grid: the ranks.
        gradient_factor: gradients inside the model are the loss's, times this.
        optimizer: takes the steps, and knows the norms of gradients; None: nobody does.
    """

    def __init__(
        self, model: GPT, grid: Grid, gradient_factor: float = 1.0, optimizer: ShardedOptimizer | ZeroOptimizer | None = None
    ) -> None:
        self._model, self._world, self._gradient_factor, self._optimizer = model, grid.world, gradient_factor, optimizer
        mine = list(dict.fromkeys(name for block in model.model.layers.values() for name in norm_names(block)))
        self._norms = list(dict.fromkeys(name for names in grid.world.gather(mine) for name in names))

    @contextmanager
    def watch(self) -> Iterator[Reading]:
        """Watch the step that is taken in this context. All ranks take the same one; at its end they send each other what they saw.

        That is one sum of 8 bytes for every channel of every site and layer, and one maximum over layers and heads.
        """
        reading = Reading()
        with watched(self._model, self._norms) as (tables, logits):
            yield reading
        squares = None if self._optimizer is None else self._optimizer.gradient_squares()
        for name, square in (squares or {}).items():
            if (block := _OF_BLOCK.match(name)) is not None:
                tables["parameter_gradient"][int(block[1])] += square
        tables.flat.copy_(self._world.sum(tables.flat))
        norms = tables["parameter_gradient"].sqrt().tolist()
        seen = self._describe(tables, self._world.max(logits.values))
        reading.record = seen | {"parameter_gradient_norm": norms if squares is not None else [None] * len(norms)}

    def _describe(self, tables: ProbeTables, logits: Tensor) -> dict[str, Any]:
        queries, uniform = tables["queries"].tolist()
        return {
            "widths": tables.widths,
            "floors": {
                site: {"kurtosis_released": floor_released(width), "kurtosis_centred": floor_centred(width)}
                for site, width in tables.widths.items()
            },
            "sites": {site: _site(tables[f"{site}.tokens"], tables[f"{site}.energy"]) for site in tables.widths},
            "gradient_norm": (tables["gradient"].sqrt() / self._gradient_factor).tolist(),
            "sink_mass": (tables["sink"].mean(1) / queries).tolist() if queries else [None] * len(logits),
            "sink_mass_uniform": uniform / queries if queries else None,
            "max_logit": logits.amax(1).tolist(),
        }


def _site(tokens: Tensor, energy: Tensor) -> dict[str, list[float | None]]:
    """Means over tokens by depth, and the share of all squares that is in the largest channel; None where no block has the site."""
    *sums, counts = tokens.unbind(1)
    values = dict(zip(MEASURES, (each / counts for each in sums), strict=True))
    values["top_channel_share"] = energy.amax(1) / energy.sum(1)
    known = (counts > 0).tolist()
    return {name: [v if here else None for v, here in zip(value.tolist(), known, strict=True)] for name, value in values.items()}


def build_probes(config: RunConfig, model: GPT, grid: Grid, optimizer: ShardedOptimizer | ZeroOptimizer) -> Probes | None:
    """The probes of a run; None where it wants none."""
    if config.logging.probes_every is None:
        return None
    # DeepSpeed takes the mean of the gradients of the data ranks, and losses are multiplied by their number.
    return Probes(model, grid, 1.0 if config.optimizer.sharding == "whole_tensor" else float(grid.shape.dp), optimizer)
