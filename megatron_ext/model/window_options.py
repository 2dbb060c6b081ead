"""What a user can say about what evaluation sees of a long document."""

from dataclasses import dataclass

from megatron_ext.option_rules import require


@dataclass(frozen=True)
class WindowOptions:
    """Lambda-shaped attention with a limit of distances, without training (LM-Infinite: Han et al. 2024, arXiv:2308.16137). A query sees
    the first and the last tokens of its document up to itself."""

    local_tokens: int
    """How many of the last: the length that the model was trained on."""
    global_tokens: int = 16
    """How many of the first."""
    max_distance: int | None = None
    """First tokens that are farther away than this count as being as far; null: ``local_tokens``."""

    def __post_init__(self) -> None:
        limit = self.max_distance
        require(
            (self.local_tokens >= 1, "local_tokens", self.local_tokens, "at least 1"),
            (self.global_tokens >= 0, "global_tokens", self.global_tokens, "at least 0"),
            (
                limit is None or limit >= self.local_tokens,
                "max_distance",
                limit,
                f"at least local_tokens ({self.local_tokens}), or null",
            ),
        )

    @property
    def longest_distance(self) -> int:
        """``max_distance``, or what null stands for."""
        return self.max_distance or self.local_tokens

    def __str__(self) -> str:
        seen = f"first {self.global_tokens:,} and last {self.local_tokens:,} tokens of a document"
        return f"{seen}, distances up to {self.longest_distance:,}"
