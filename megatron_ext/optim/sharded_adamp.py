"""AdamP on matrices that are divided over tensor-parallel ranks: the ranks add up a few sums of each row and move no matrix."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_ext.kernels.adamp import AdamUpdate, adamp_moments, adamp_update
from megatron_ext.kernels.projection import Matrices, Summary, matrices, project, summarize
from megatron_ext.parallel.group import MAX, Group
from megatron_ext.parallel.placement import Box, Placement


class ShardedAdamP(torch.optim.Optimizer):
    """``AdamP`` on this rank's part of each matrix, as if every rank had all of it: equal within rounding of the order of sums.

    A step sends, of matrices cut within rows, four float64 numbers a row, and of all matrices five numbers, in three all-reduces.

    Args:
        named: names and parts, in one order on all ranks of the group.
        placements: of the parameters; what the parts are parts of.
        group: the tensor-parallel ranks.
        lr, betas, eps, weight_decay, delta, wd_ratio, nesterov, fused: as of ``AdamP``.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        placements: Mapping[str, Placement],
        group: Group,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        delta: float,
        wd_ratio: float,
        nesterov: bool,
        fused: bool = False,
    ) -> None:
        named = list(named)
        shared = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "delta": delta, "wd_ratio": wd_ratio}
        super().__init__([tensor for _, tensor in named], {**shared, "nesterov": nesterov, "fused": fused})
        self._group = group
        self._where = [placements[name] for name, _ in named]
        self._first = _first_holders([placement.box for placement in self._where], group, named[0][1].device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of the parts that have a gradient. All ranks of the group take it together, with gradients of the same parts."""
        ages: dict[int, list[int]] = {}
        for number, part in ((n, part) for n, part in enumerate(self.param_groups[0]["params"]) if part.grad is not None):
            ages.setdefault(self._next_step(part), []).append(number)
        for steps, numbers in ages.items():
            self._update(numbers, steps)

    def _update(self, numbers: list[int], steps: int) -> None:
        """Update parts of one age."""
        group = self.param_groups[0]
        parts = [group["params"][number] for number in numbers]
        states = [self.state[part] for part in parts]
        adam = AdamUpdate(steps, group["betas"], group["eps"], group["nesterov"])
        kernel: dict[str, Any] = {"backend": "cpu", "threads": torch.get_num_threads()} if group["fused"] else {}
        tensors = (parts, [part.grad for part in parts], [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states])
        where = [self._where[number] for number in numbers]
        here = matrices(tuple(each.shape for each in where), group["delta"], parts[0].device, tuple(len(part) for part in parts))
        sums = self._whole_rows(adamp_moments(*tensors, adam, **kernel), where, here)
        summary = self._whole_matrices(summarize(sums, here, adam.eps), self._first[numbers])
        projection = project(sums, summary, here, adam.eps)
        decays = projection.decays(group["lr"], group["weight_decay"], group["wd_ratio"])
        adamp_update(*tensors, adam, projection.coefficients, decays, group["lr"] / adam.corrections[0], **kernel)

    def _next_step(self, part: Tensor) -> int:
        """Number of the coming step of a part, which is noted."""
        state = self.state[part]
        if not state:
            state.update({"step": torch.zeros(()), "exp_avg": torch.zeros_like(part), "exp_avg_sq": torch.zeros_like(part)})
        # On the host, so that reading it does not wait for the device, wherever a checkpoint had put it.
        state["step"] = state["step"].cpu() + 1
        return int(state["step"])

    def _whole_rows(self, sums: Tensor, where: list[Placement], here: Matrices) -> Tensor:
        """Add up the sums of rows that are cut; in place."""
        cut = torch.tensor([placement.box[1] != (0, placement.shape[1]) for placement in where], device=sums.device)
        of_rows = cut.repeat_interleave(here.rows, output_size=len(sums))
        sums[of_rows] = self._group.all_reduce(sums[of_rows])
        return sums

    def _whole_matrices(self, summary: Summary, first: Tensor) -> Summary:
        """Over the ranks that hold other rows. Of equal rows on several ranks, those of the ``first`` count."""
        totals = torch.where(first[:, None], summary.totals, torch.zeros_like(summary.totals))
        return Summary(self._group.all_reduce(summary.cosines.clone(), MAX), self._group.all_reduce(totals))


def _first_holders(boxes: list[Box], group: Group, device: torch.device) -> Tensor:
    """Bool [parts]: no rank before this one holds the same rows."""
    rows = torch.tensor([box[0] for box in boxes], dtype=torch.int64, device=device)
    before = group.all_gather(rows).view(group.size, len(boxes), 2)[: group.rank]
    return ~(before == rows).all(-1).any(0)
