"""Sums of the losses of a step, told apart by source."""

import torch

from megatron_ext.parallel.grid import Grid


class LossSums:
    """Sum of token losses in nats, and number of labelled tokens, by number of source, over the packs of this rank.

    Args:
        num_sources: number of sources.
    """

    def __init__(self, num_sources: int) -> None:
        self.values = torch.zeros(2, num_sources, dtype=torch.float64)

    def add(self, token_loss: torch.Tensor, loss_weight: torch.Tensor, sources: torch.Tensor) -> None:
        """Add a pack: unweighted losses [T], float weights [T], int64 sources [T]."""
        weight = loss_weight.double()
        sums = torch.zeros_like(self.values, device=weight.device)
        sums[0].index_add_(0, sources, token_loss.double() * weight)
        sums[1].index_add_(0, sources, weight)
        self.values += sums.cpu()

    def over(self, grid: Grid, beside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums [2, sources] over all packs of all ranks, and that of ``beside``, small float64 values of every rank.

        The tensor-parallel ranks of the last stage all have the losses of their packs; the first of them counts.
        """
        counts = grid.is_last_stage and grid.tp.rank == 0
        mine = self.values if counts else torch.zeros_like(self.values)
        total = grid.world.sum(torch.cat([mine.flatten(), beside]))
        return total[: mine.numel()].view_as(mine), total[mine.numel() :]
