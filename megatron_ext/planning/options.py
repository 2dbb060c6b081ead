"""What a user can say about plans."""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.option_rules import require


@dataclass
class PlanningOptions:
    """How the documents of a step are spread over ranks."""

    policy: Literal["data_parallel"] = "data_parallel"
    """``data_parallel``: whole documents, best-fit packing, packs spread over the data ranks."""
    tokens_per_pack: int | None = None
    """Most tokens that one rank computes at once; null: ``data.sequence_length``. Memory grows with it."""

    def __post_init__(self) -> None:
        pack = self.tokens_per_pack
        require((pack is None or pack >= 1, "tokens_per_pack", pack, "a number of tokens, at least 1, or null"))
