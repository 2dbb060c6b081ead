"""Ranks that take longer than those that do the same work."""

import socket
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ext.config.run_options import LoggingOptions
from megatron_ext.parallel.grid import Grid


@dataclass(frozen=True)
class Straggler:
    """A rank that was slow for many steps in a row; ``ratio`` is the mean of its seconds over the median of these steps."""

    rank: int
    host: str
    ratio: float
    steps: int

    @property
    def message(self) -> str:
        """For people."""
        return (
            f"warning: rank {self.rank} on host {self.host} took {self.ratio:.2f} times as long as the median rank for {self.steps} steps"
        )


class StragglerWatch:
    """Compares the seconds of own work of the ranks of a stage with their median, step by step.

    It tells and decides nothing, and has no state to save: its counts are those since the start. All ranks make one.

    On a CPU these seconds are without waiting for others. On a GPU they are those of the host, see ``Activity``: ranks that share tensors
    or packs with a slow one look as slow. In a pipeline only the last stage reads its losses pack by pack; on the stages before, seconds
    are little more than those of launching kernels.

    Args:
        grid: the ranks.
        options: from which ratio on, and for how many steps in a row, a rank counts as a straggler.
    """

    def __init__(self, grid: Grid, options: LoggingOptions) -> None:
        self._ratio, self._steps = options.straggler_ratio, options.straggler_steps
        self._stages = [grid.shape.coordinates(rank)[0] for rank in range(grid.shape.size)]
        self._hosts: list[str] = grid.world.gather(socket.gethostname())
        self._rows: dict[int, list[float]] = {}
        self._slow: Counter[int] = Counter()

    def look(self, seconds: Sequence[float]) -> tuple[dict[str, Any], list[Straggler]]:
        """Of a step in which the ranks worked so many seconds: what metrics.jsonl says, and whom to tell about now, once in a row."""
        if len(seconds) == 1:
            return {}, []
        ratios = self._ratios(seconds)
        found = []
        for rank, ratio in enumerate(ratios):
            row = self._rows.setdefault(rank, [])
            if ratio < self._ratio:
                row.clear()
                continue
            self._slow[rank] += 1
            row.append(ratio)
            if len(row) == self._steps:
                found.append(Straggler(rank, self._hosts[rank], statistics.fmean(row), self._steps))
        slowest = max(range(len(ratios)), key=ratios.__getitem__)
        record = {
            "slowest_rank": slowest,
            "slowest_ratio": ratios[slowest],
            "slow_steps": {str(rank): self._slow[rank] for rank in self._slow},
        }
        return record, found

    def _ratios(self, seconds: Sequence[float]) -> list[float]:
        """Of each rank's seconds over the median of its stage: stages differ in what they have to do."""
        medians = {
            stage: statistics.median(value for value, own in zip(seconds, self._stages, strict=True) if own == stage)
            for stage in set(self._stages)
        }
        return [value / medians[stage] if medians[stage] > 0 else 1.0 for value, stage in zip(seconds, self._stages, strict=True)]
