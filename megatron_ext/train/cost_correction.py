"""How much slower than the cost model says computing and exchanging are, from the times of whole steps."""

import hashlib
import json
from typing import Any

import numpy as np
import torch

from megatron_ext.parallel.world import World
from megatron_ext.planning import Plan
from megatron_ext.planning.cost_file import cost_to_json
from megatron_ext.planning.cost_model import CostModel
from megatron_ext.planning.timeline import pack_seconds, timeline

LARGEST = 8.0
"""Factors stay between this and its inverse: a machine that was busy with something else must not spoil the plans that follow."""
CONFIDENCE = 0.01
"""Weight, as a share of the measurements, of the belief that nothing need be corrected: it decides where steps cannot tell."""


class CostCorrection:
    """Factors on all compute and on all exchanges of a cost model, fitted by least squares to measured seconds.

    Args:
        base: the model that is corrected.
    """

    def __init__(self, base: CostModel) -> None:
        self._base = hashlib.blake2b(json.dumps(cost_to_json(base)).encode(), digest_size=8).hexdigest()
        self.compute = self.exchange = 1.0
        self._first = True
        # Sums of products of (compute, exchange, measured), over steps: the normal equations.
        self._products = np.zeros((3, 3))

    def corrected(self, base: CostModel) -> CostModel:
        """``base`` with the factors."""
        return base.scaled(self.compute, self.exchange)

    def add(self, plan: Plan, rank: int, cost: CostModel, measured: float) -> None:
        """Note a step: its plan, the costs that it was planned by, and the seconds that the packs of data rank ``rank`` took.

        What the plan has the rank wait for others between its packs is not charged to its packs. The first step is left out: it makes
        groups and buffers.
        """
        if self._first:
            self._first = False
            return
        seconds = pack_seconds(plan, cost)
        times = timeline(plan, seconds)
        mine = [number for number, pack in enumerate(plan.packs) if rank in pack.ranks and pack.slices]
        exchange = sum(float(cost.exchange_seconds(plan.packs[number].tokens, plan.packs[number].degree)) for number in mine)
        total = float(seconds[mine].sum())
        waiting = float(times.end[mine].max(initial=0.0)) - total
        row = np.array([total - exchange, exchange, max(0.0, measured - waiting)])
        self._products += np.outer(row, row)

    def fit(self, world: World) -> None:
        """Multiply the factors by what the steps of all ranks since the last fit say; forgets those steps."""
        products = world.sum(torch.from_numpy(self._products.flatten())).view(3, 3).numpy()
        belief = CONFIDENCE * np.trace(products[:2, :2]) * np.eye(2)
        if np.trace(belief) > 0:
            factors = np.linalg.solve(products[:2, :2] + belief, products[:2, 2] + belief @ np.ones(2))
            self.compute, self.exchange = np.clip(np.array([self.compute, self.exchange]) * factors, 1 / LARGEST, LARGEST).tolist()
        self._products[:] = 0.0

    def state(self) -> dict[str, Any]:
        """The factors, and what they are factors of, as JSON values."""
        return {"base": self._base, "compute": self.compute, "exchange": self.exchange}

    def load(self, state: dict[str, Any] | None) -> None:
        """Take up the factors of an earlier run. They do not apply to another model, machine or grid than they were fitted on."""
        if state is not None and state["base"] == self._base:
            self.compute, self.exchange = state["compute"], state["exchange"]
