"""What a user can say about plans."""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.option_rules import require


@dataclass
class PlanningOptions:
    """How the documents of a step are spread over ranks."""

    policy: Literal["data_parallel", "static", "best_static", "adaptive"] = "data_parallel"
    """``data_parallel``: every rank computes whole documents, in best-fit packs. ``static``: blocks of ``degree`` ranks share every pack.
    ``best_static``: as ``static``, with the degree that suits the step best. ``adaptive``: blocks of different sizes, by the lengths of the
    step's documents."""
    tokens_per_pack: int | None = None
    """Most tokens that one rank computes at once; null: ``data.sequence_length``. Memory grows with it. A block of d ranks computes packs
    of d times as many, and so documents that no rank could alone."""
    degree: int | None = None
    """Ranks that share a pack with ``static``: a power of two."""
    largest_degree: int | None = None
    """Most ranks that share a pack: a power of two; null: as many as there are query heads on a rank. Beyond that number keys and values go
    around a ring besides."""
    cost_model: str | None = None
    """JSON file that tools/calibrate.py wrote for this model on this machine; null: rough costs from the shape of the model."""
    correct: bool = False
    """At each checkpoint, correct the cost model by the step times that were measured since the last. Later plans then depend on what was
    measured: two runs of one configuration no longer make the same plans."""
    split_long: bool = False
    """Documents that are too long for the largest block are cut to fit, into contexts of their own: losses then depend on the ranks and on
    ``tokens_per_pack``. false: they are refused."""
    ahead: int = 2
    """Steps that are planned ahead, in a process beside rank 0; 0: each step is planned when it comes."""

    def __post_init__(self) -> None:
        pack, degree, largest = self.tokens_per_pack, self.degree, self.largest_degree
        static = self.policy == "static"
        require(
            (pack is None or pack >= 1, "tokens_per_pack", pack, "a number of tokens, at least 1, or null"),
            (not static or degree is not None, "degree", degree, "a power of two, because policy is static"),
            (static or degree is None, "degree", degree, f"null, because policy is {self.policy}"),
            (degree is None or _is_power_of_two(degree), "degree", degree, "a power of two"),
            (largest is None or _is_power_of_two(largest), "largest_degree", largest, "a power of two, or null"),
            (
                degree is None or largest is None or degree <= largest,
                "degree",
                degree,
                f"at most largest_degree ({largest})",
            ),
            (self.ahead >= 0, "ahead", self.ahead, "a number of steps, at least 0"),
        )


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
