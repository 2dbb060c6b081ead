"""What a user can say about the norms of the residual stream, and where they stand."""

from dataclasses import dataclass
from typing import Literal

NormKind = Literal["rms", "layer", "ss", "crms", "power", "unified"]
Placement = Literal["pre", "post", "peri", "mix"]


@dataclass(frozen=True)
class NormOptions:
    """Norms of the residual stream. Those of queries and keys (``model.qk_norm``) are RMSNorm whatever stands here."""

    kind: NormKind = "rms"
    """``rms``: RMSNorm; ``layer``: LayerNorm with bias; ``ss``: RMSNorm with one gain for all channels (SSNorm); ``crms``: RMSNorm of a
    stream of mean zero whose last channel is not stored; ``power``, ``unified``: by statistics of the tokens of earlier steps (PowerNorm,
    Unified Normalization), through which documents reach each other in training."""
    placement: Placement = "pre"
    """``pre``: before attention and MLP; ``post``: after each residual addition; ``peri``: before attention and MLP, and of their outputs
    before the addition; ``mix``: ``post`` in the first quarter of the blocks, ``pre`` in the rest."""
    depth_scaling: bool = False
    """Multiply what the norms of block l give by 1/sqrt(l), l counted from 1; initial weights are then not scaled by depth."""
    embedding_norm: bool = False
    """A norm of the embeddings, before the first block."""

    @property
    def keeps_statistics(self) -> bool:
        """Statistics of the tokens of earlier steps."""
        return self.kind in ("power", "unified")
