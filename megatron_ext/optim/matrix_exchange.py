"""Matrices that are divided over tensor-parallel ranks, put together on one of them for a rule that needs them whole, and back."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_ext.optim.ownership import OwnedBox
from megatron_ext.parallel.group import Group
from megatron_ext.parallel.placement import Box, box_shape, slices, whole_box


class MatrixExchange:
    """One all-to-all puts the parts of all matrices together, each on its own rank (``OwnedBox.meets_on``); another brings new values back.

    Where several ranks hold the same part, that of the first counts, and all get its new values. With B bytes of this rank's parts, a
    rank sends B (n - 1) / n in the mean, and as much again on the way back.

    Args:
        parts: this rank's part of each matrix, in one order on all ranks of the group.
        shapes: of the whole matrices, by name.
        group: the tensor-parallel ranks.
        device: of the tensors.
    """

    def __init__(self, parts: Sequence[OwnedBox], shapes: Mapping[str, torch.Size], group: Group, device: torch.device) -> None:
        self.parts = list(parts)
        self._shapes = shapes
        self._group = group
        mine = torch.tensor([part.box for part in parts], dtype=torch.int64, device=device).reshape(len(parts), 4)
        of_ranks = group.all_gather(mine).reshape(group.size, len(parts), 2, 2).tolist() if parts else []
        self._boxes: list[list[Box]] = [[tuple(map(tuple, box)) for box in boxes] for boxes in of_ranks]

    @property
    def met_here(self) -> list[OwnedBox]:
        """The whole matrices that are put together on this rank."""
        mine = [self.parts[number] for number in self._met_on(self._group.rank)]
        return [OwnedBox(part.name, whole_box(self._shapes[part.name]), part.owner) for part in mine]

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Of this rank's part of every matrix, in order of ``parts``, to the matrices of ``met_here``."""
        ranks = range(self._group.size)
        sent = [[n for n in self._met_on(rank) if self._counts(self._group.rank, n)] for rank in ranks]
        arriving = [[n for n in self._met_on(self._group.rank) if self._counts(rank, n)] for rank in ranks]
        received = self._exchange(
            [[tensors[n] for n in numbers] for numbers in sent], [self._of(r, arriving[r]) for r in ranks], tensors[0]
        )
        wholes = {n: tensors[0].new_empty(self._shapes[self.parts[n].name]) for n in self._met_on(self._group.rank)}
        for rank, numbers in enumerate(arriving):
            for number, values in zip(numbers, received[rank], strict=True):
                wholes[number][self._place(rank, number)] = values
        return list(wholes.values())

    def scatter(self, wholes: Sequence[Tensor], like: Tensor) -> list[Tensor]:
        """Of the matrices of ``met_here`` to this rank's part of every matrix, in order of ``parts``; in the dtype of ``like``."""
        ranks, here = range(self._group.size), self._met_on(self._group.rank)
        sent = [[whole[self._place(rank, n)].to(like.dtype) for n, whole in zip(here, wholes, strict=True)] for rank in ranks]
        numbers = [self._met_on(rank) for rank in ranks]
        received = self._exchange(sent, [self._of(self._group.rank, numbers[rank]) for rank in ranks], like)
        parts = {n: values for rank in ranks for n, values in zip(numbers[rank], received[rank], strict=True)}
        return [parts[number] for number in range(len(self.parts))]

    def _exchange(self, sent: list[list[Tensor]], arriving: list[list[torch.Size]], like: Tensor) -> list[list[Tensor]]:
        """Send each rank its tensors; returns what came from each rank, of the shapes ``arriving``."""
        flat = [tensor.reshape(-1) for tensors in sent for tensor in tensors]
        sizes = [sum(tensor.numel() for tensor in tensors) for tensors in sent]
        expected = [sum(shape.numel() for shape in shapes) for shapes in arriving]
        received = self._group.all_to_all(torch.cat(flat) if flat else like.new_empty(0), sizes, expected)
        return [
            [values.view(shape) for values, shape in zip(part.split([shape.numel() for shape in shapes]), shapes, strict=True)]
            for part, shapes in zip(received.split(expected), arriving, strict=True)
        ]

    def _met_on(self, rank: int) -> list[int]:
        return [number for number, part in enumerate(self.parts) if part.meets_on == rank]

    def _counts(self, rank: int, number: int) -> bool:
        """No rank before this one holds the same part."""
        return all(self._boxes[before][number] != self._boxes[rank][number] for before in range(rank))

    def _of(self, rank: int, numbers: Sequence[int]) -> list[torch.Size]:
        return [box_shape(self._boxes[rank][number]) for number in numbers]

    def _place(self, rank: int, number: int) -> tuple[slice, ...]:
        return slices(self._boxes[rank][number], whole_box(self._shapes[self.parts[number].name]))
