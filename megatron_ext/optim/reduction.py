"""Gradients on their way to their owners, while backward still computes others."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch

from megatron_ext.optim.main_gradients import MainGradients
from megatron_ext.optim.ownership import OwnedBox, local
from megatron_ext.parallel.activity import Pending
from megatron_ext.parallel.group import Group
from megatron_ext.parallel.placement import Placement


class GradientReduction:
    """Sums each gradient over the data ranks into its owner, bucket by bucket.

    Buckets leave in one order, the same on all ranks, because a collective meets the one that the others issue in its place. A bucket
    leaves when all its gradients are final and all buckets before it have left; what has not left when the step comes leaves then. A
    gradient is released when its last bucket has left. With dp data ranks, B bytes of main gradients send B (dp - 1) / dp a rank in the
    mean.

    Args:
        buckets: what leaves together, in the order in which it is to leave.
        parameters: of this rank, by name.
        placements: of the parameters.
        group: the data ranks.
        overlap: begin during the last backward pass.
    """

    def __init__(
        self,
        buckets: Sequence[list[OwnedBox]],
        parameters: Mapping[str, torch.nn.Parameter],
        placements: Mapping[str, Placement],
        group: Group,
        overlap: bool,
    ) -> None:
        self._buckets = list(buckets)
        self._placements = placements
        self._group = group
        self.gradients = MainGradients(parameters, self._on_final if overlap and group.size > 1 else None)
        self._parts = Counter(part.name for bucket in self._buckets for part in bucket)
        self._final: set[str] = set()
        self._left: list[tuple[list[OwnedBox], torch.Tensor, Pending | None]] = []
        self._held = Counter(self._parts)

    def begin(self, backwards: int) -> None:
        """A step of ``backwards`` backward passes begins."""
        self.gradients.expect(backwards)

    def finish(self) -> Iterator[tuple[OwnedBox, torch.Tensor]]:
        """The parts that this rank owns with their gradients, summed over the data ranks."""
        if self._group.size == 1:
            for bucket in self._buckets:
                yield from ((part, self._local(part)) for part in bucket)
            return
        while len(self._left) < len(self._buckets):
            self._send_next()
        for bucket, flat, work in self._left:
            if work is not None:
                work.wait()
            if bucket[0].owner == self._group.rank:
                yield from zip(bucket, unflatten(flat, [self._shape(part) for part in bucket]), strict=True)
        self._left.clear()

    def clear(self) -> None:
        """Forget all gradients, at the end of a step."""
        self.gradients.clear()
        self._left.clear()
        self._final.clear()
        self._held = Counter(self._parts)

    def _on_final(self, name: str) -> None:
        self._final.add(name)
        while len(self._left) < len(self._buckets) and all(part.name in self._final for part in self._buckets[len(self._left)]):
            self._send_next()

    def _send_next(self) -> None:
        bucket = self._buckets[len(self._left)]
        flat = flatten([self._local(part) for part in bucket])
        self._left.append((bucket, flat, self._group.start_reduce(flat, bucket[0].owner)))
        for part in bucket:
            self._held[part.name] -= 1
            if not self._held[part.name]:
                self.gradients.release(part.name)

    def _local(self, part: OwnedBox) -> torch.Tensor:
        return local(part, self._placements[part.name], self.gradients[part.name])

    def _shape(self, part: OwnedBox) -> torch.Size:
        return torch.Size(stop - start for start, stop in part.box)


def flatten(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One flat tensor of all values; of a single contiguous tensor, the tensor itself."""
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def unflatten(flat: torch.Tensor, shapes: Sequence[torch.Size]) -> list[torch.Tensor]:
    """Views of ``flat`` of these shapes, one after another."""
    return [part.view(shape) for part, shape in zip(flat.split([shape.numel() for shape in shapes]), shapes, strict=True)]
