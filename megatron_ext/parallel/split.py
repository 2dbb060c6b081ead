"""How a dimension of a parameter is divided over the tensor-parallel ranks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """Rows (or columns) ``start`` to ``stop`` of ``total``, held by ``copies`` neighbouring ranks."""

    total: int
    start: int
    stop: int
    copies: int = 1

    @property
    def size(self) -> int:
        """Rows of this rank."""
        return self.stop - self.start


def even_split(total: int, rank: int, size: int) -> Split:
    """Rank ``rank``'s part of ``total``; where ``size`` does not divide it, the first ranks hold one more."""
    share, more = divmod(total, size)
    start = rank * share + min(rank, more)
    return Split(total, start, start + share + (rank < more))


def head_split(heads: int, head_dim: int, rank: int, size: int) -> Split:
    """Whole heads: ``heads / size`` a rank, or one head on each of ``size / heads`` neighbours where there are fewer heads than ranks."""
    assert heads % size == 0 or size % heads == 0, "refused with the configuration"
    copies = max(1, size // heads)
    part = even_split(heads, rank // copies, size // copies)
    return Split(heads * head_dim, part.start * head_dim, part.stop * head_dim, copies)
