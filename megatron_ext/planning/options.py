"""What a user can say about plans."""

from dataclasses import dataclass


@dataclass
class PlanningOptions:
    """How the documents of a step are spread over ranks."""

    policy: str = "data_parallel"
    """``data_parallel``: whole documents, best-fit packing, packs spread over the data ranks."""
    tokens_per_pack: int | None = None
    """Most tokens that one rank computes at once; null: ``data.sequence_length``. Memory grows with it."""
