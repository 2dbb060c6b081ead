"""Square matrices between the vocabulary and the residual stream (EmbProj: Park et al. 2025, arXiv:2506.19697, section 3.3)."""

from torch import Tensor, nn


class EmbeddingProjection(nn.Linear):
    """x W^T of a learned square matrix, which every tensor-parallel rank has whole. It is orthogonal at first and free afterwards.

    Args:
        size: width of the residual stream.
        partial: each tensor-parallel rank projects other tokens, so that their gradients must be summed.
    """

    def __init__(self, size: int, partial: bool) -> None:
        super().__init__(size, size, bias=False)
        self.partial = partial


def shrink_gradient(x: Tensor, alpha: float) -> Tensor:
    """``x`` itself, with gradients times ``alpha`` (GLM-130B: Zeng et al. 2022, arXiv:2210.02414, section 3.2).

    Interpolated between equal values, which rounds nothing, where the sum of alpha x and (1 - alpha) x would.
    """
    return x if alpha == 1.0 else x.detach().lerp(x, alpha)
