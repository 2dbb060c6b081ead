"""The plan of each step: made on rank 0, ahead of time where that takes time, and sent to all ranks at once."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.data.corpus import Corpus, Piece
from megatron_ext.data.sampler import Sampler
from megatron_ext.errors import DataError
from megatron_ext.parallel.grid import Grid
from megatron_ext.planning import Plan
from megatron_ext.planning.cost_model import CostModel
from megatron_ext.planning.plan import HEADER
from megatron_ext.planning.timeline import pack_seconds, timeline
from megatron_ext.planning.worker import PlannedStep, PlanSettings, PlanWorker

AHEAD = frozenset({"best_static", "adaptive"})
"""Policies that are worth a process of their own; the others take no time."""


@dataclass(frozen=True)
class StepPlan:
    """The plan of a step; on rank 0 with what is known about it."""

    plan: Plan
    made: PlannedStep | None
    stall_seconds: float
    """How long rank 0 waited for it."""

    def record(self) -> dict[str, object]:
        """What metrics.jsonl says of it; only on rank 0."""
        assert self.made is not None, "rank 0 knows"
        tokens: Counter[int] = Counter()
        for pack in self.plan.packs:
            tokens[pack.degree] += pack.tokens
        return {
            "plan_policy": self.made.policy,
            "plan_seconds": self.made.seconds,
            "plan_gap": self.made.seconds / self.made.bound - 1.0 if self.made.bound else 0.0,
            "planning_seconds": self.made.planning_seconds,
            "plan_stall_seconds": self.stall_seconds,
            "tokens_by_degree": {str(degree): tokens[degree] for degree in sorted(tokens) if tokens[degree]},
        }

    def picture(self, cost: CostModel) -> dict[str, object]:
        """Packs with their predicted begins and ends, in seconds since the begin of the step; only on rank 0."""
        assert self.made is not None, "rank 0 knows"
        times = timeline(self.plan, pack_seconds(self.plan, cost))
        packs = [
            [pack.first_rank, pack.degree, pack.ring, pack.tokens, len(pack.slices), float(begin), float(end)]
            for pack, begin, end in zip(self.plan.packs, times.begin, times.end, strict=True)
        ]
        whole = {"devices": self.plan.num_ranks, "in_rounds": self.plan.in_rounds, "seconds": times.seconds, "bound": self.made.bound}
        return {**whole, "packs": packs}


class StepPlanner:
    """Makes the plans of a run. All ranks make one and ask it for the same plans.

    Args:
        settings: of all plans.
        cost: what packs cost.
        grid: the ranks.
        mixture: whose next steps of ``tokens_per_step`` will be asked for, in order.
        tokens_per_step: most tokens of a step.
        ahead: how many steps are planned before they are asked for.
    """

    def __init__(self, settings: PlanSettings, cost: CostModel, grid: Grid, mixture: Sampler, tokens_per_step: int, ahead: int) -> None:
        self.settings, self.cost = settings, cost
        self._world = grid.world
        self._tokens_per_step, self._ahead = tokens_per_step, ahead
        self._worker: PlanWorker | None = None
        self.restart(mixture, cost)

    def restart(self, mixture: Sampler, cost: CostModel) -> None:
        """Plan what follows by other costs, or from another place of the mixture."""
        self.close()
        self.cost = cost
        if self._world.is_main and self._ahead > 0 and self.settings.policy in AHEAD:
            self._scout = mixture.copy()
            self._worker = PlanWorker(self.settings, cost)
            for _ in range(self._ahead):
                self._ask()

    def next_step(self, pieces: Sequence[Piece], corpora: Sequence[Corpus]) -> StepPlan:
        """The plan of the next step, which trains on these pieces.

        Raises:
            DataError: a piece that no block can hold, with its source and document.
        """
        lengths = self._lengths(pieces, corpora)
        begin = time.perf_counter()
        made = None
        if self._worker is not None:
            made = self._worker.answer()
            self._ask()
        elif self._world.is_main:
            made = PlannedStep.make(self.settings, lengths, self.cost)
        stall = time.perf_counter() - begin
        return StepPlan(self._shared(made, lengths), made, stall)

    def now(self, pieces: Sequence[Piece], corpora: Sequence[Corpus]) -> Plan:
        """A plan of other pieces than the next step's. Raises as ``next_step``."""
        lengths = self._lengths(pieces, corpora)
        return self._shared(PlannedStep.make(self.settings, lengths, self.cost) if self._world.is_main else None, lengths)

    def _shared(self, made: PlannedStep | None, lengths: Sequence[int]) -> Plan:
        # A pack for each document, and some without tokens on every rank. More is sent in a second message.
        usual = HEADER + 7 * len(lengths) + 16 * self.settings.devices
        plan = Plan.decode(np.array(self._world.from_main(made.encoded if made else None, usual), dtype=np.int32))
        plan.validate(lengths, self.cost.tokens_per_rank)
        return plan

    def _lengths(self, pieces: Sequence[Piece], corpora: Sequence[Corpus]) -> list[int]:
        """Tokens of each piece, none too long for the largest block."""
        most = self.settings.longest_document(self.cost)
        for piece in pieces:
            if len(piece) > most and not self.settings.split_long:
                raise DataError(
                    f"{corpora[piece.source].path}.bin, document {piece.document}: {len(piece)} tokens; the largest block holds {most}: "
                    "raise planning.tokens_per_pack, planning.degree or planning.largest_degree, lower data.sequence_length, "
                    "or cut such documents by planning.split_long"
                )
        return [len(piece) for piece in pieces]

    def _ask(self) -> None:
        assert self._worker is not None, "only where plans are made ahead"
        self._worker.ask([len(piece) for piece in self._scout.take(self._tokens_per_step)])

    def close(self) -> None:
        """End the process that plans ahead."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
