"""What every block of a forward pass needs to know about the pack: computed once, shared by all layers."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PackContext:
    """The documents of a pack and the angles of its positions."""

    cu_seqlens: Tensor
    """First token of each document, and the number of tokens: int32 [documents + 1]."""
    max_seqlen: int
    """Tokens of the longest document, or more."""
    cos: Tensor
    """Cosines of ``rope_tables`` [T, head_dim]."""
    sin: Tensor
    """Signed sines of ``rope_tables`` [T, head_dim]."""

    @property
    def tokens(self) -> int:
        """T, the tokens of the pack."""
        return len(self.cos)
