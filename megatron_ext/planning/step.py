"""The documents of one step, as policies and bounds see them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.errors import ConfigError
from megatron_ext.planning.cost_model import Array, CostModel
from megatron_ext.planning.exchange import ExchangeTable
from megatron_ext.planning.plan import IntArray


@dataclass(frozen=True)
class Step:
    """What there is to plan."""

    lengths: IntArray
    """Tokens of each document, [documents]."""
    work: Array
    """Seconds of each document on one rank alone, [documents]."""
    devices: int
    cost: CostModel
    degrees: tuple[int, ...]
    """Sizes of blocks, ascending."""
    exchange: ExchangeTable
    """Of these degrees."""
    in_rounds: bool

    @classmethod
    def of(
        cls, lengths: Sequence[int], devices: int, cost: CostModel, largest_degree: int | None = None, in_rounds: bool = False
    ) -> "Step":
        """From the arguments of ``plan_step``."""
        tokens = np.asarray(lengths, dtype=np.int64)
        degrees = tuple(cost.degrees(devices, largest_degree))
        return cls(tokens, cost.work(tokens), devices, cost, degrees, ExchangeTable.of(cost, degrees), in_rounds)

    def require_room(self, degree: int | None = None) -> None:
        """Raises ConfigError naming the first document, if any, that does not fit ``degree`` ranks (None: the largest block)."""
        degree = degree or self.degrees[-1]
        holds, ranks = self.cost.capacity(degree), "1 rank" if degree == 1 else f"a block of {degree} ranks"
        too_long = self.lengths > holds
        if too_long.any():
            document = int(too_long.argmax())
            seen = f"document {document} has {self.lengths[document]} tokens; {ranks} holds {holds}"
            raise ConfigError(f"{seen}: raise planning.tokens_per_pack or planning.largest_degree")
