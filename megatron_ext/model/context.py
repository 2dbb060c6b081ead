"""What every block of a forward pass needs to know about the pack: computed once, shared by all layers."""

from dataclasses import dataclass

from torch import Tensor

from megatron_ext.model.evaluation_window import EvaluationWindow
from megatron_ext.parallel.sequence import Sharing


@dataclass(frozen=True)
class PackContext:
    """The documents of a pack and the angles of its positions."""

    cu_seqlens: Tensor
    """First token of each document in the whole pack, and the number of its tokens: int32 [documents + 1]."""
    max_seqlen: int
    """Tokens of the longest document, or more."""
    sharing: Sharing | None
    """The ranks that have the other tokens of the pack; None: this one has them all."""
    cos: Tensor
    """Cosines of ``rope_tables`` [T, head_dim], T this rank's tokens."""
    sin: Tensor
    """Signed sines of ``rope_tables`` [T, head_dim]."""
    window: EvaluationWindow | None = None
    """What attention sees instead of the whole document before a query; None: all of it."""

    @property
    def tokens(self) -> int:
        """T, this rank's tokens of the pack."""
        return len(self.cos)
