"""Some ranks of the world and their collectives, each of which counts what it sends."""

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from megatron_ext.parallel.activity import Activity, Collective, Pending
from megatron_ext.parallel.device import synchronize

PACK_AXES = ("block", "ring")
"""Groups of ranks that share packs."""
SUM, MAX, MIN = dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN
# torch 2.13 renames both.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Traffic:
    """Bytes sent by one rank, by (axis, collective): what a bandwidth-optimal algorithm sends, as the docstrings of ``Group`` say."""

    sent: Counter[tuple[str, str]] = field(default_factory=Counter)
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    exchange_seconds: float = 0.0
    """Spent in all-to-alls and rings of packs, waiting for other ranks included. Counted on CPUs only: GPUs work on while we count."""


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other, as one of them sees them. In a group of one, and for a tensor without elements, nothing is sent.

    In the formulas, n is the size of the group and B the bytes of the argument. They are those of bandwidth-optimal algorithms, which nccl
    has; of gloo (torch 2.13, measured by the tests) they hold but for ``reduce_scatter``, which sends twice as much, and ``start_reduce``,
    which sends up to 2.3 times as much.
    """

    axis: str
    """What the group is for: ``tp``, ``dp``, ``pp``, ``replicas``, ``block``."""
    ranks: tuple[int, ...]
    """Global ranks, in order."""
    rank: int
    """This rank's place in ``ranks``."""
    handle: dist.ProcessGroup | None
    """None in a group of one."""
    traffic: Traffic
    activity: Activity = field(default_factory=Activity, compare=False, repr=False)
    """Of this rank; it is told of every wait."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = SUM) -> Tensor:
        """Reduce in place over all ranks, equal bits on each; returns ``tensor``. Sends 2 B (n - 1) / n."""
        if self.size > 1 and tensor.numel():
            self._count("all_reduce", 2 * (self.size - 1) * tensor.nbytes // self.size)
            with self._waiting("all_reduce"):
                dist.all_reduce(tensor, op, group=self.handle)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Tensors of all ranks, of one shape [m, ...], one after another [n m, ...]. Sends (n - 1) B."""
        if self.size == 1:
            return tensor
        whole = tensor.new_empty(self.size * len(tensor), *tensor.shape[1:])
        if not whole.numel():
            return whole
        self._count("all_gather", (self.size - 1) * tensor.nbytes)
        with self._waiting("all_gather"):
            _all_gather(whole, tensor.contiguous(), group=self.handle)
        return whole

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """Sum of ``tensor`` [n m, ...] over the ranks, of which each gets its m rows. Sends B (n - 1) / n."""
        if self.size == 1:
            return tensor
        part = tensor.new_empty(len(tensor) // self.size, *tensor.shape[1:])
        if not part.numel():
            return part
        self._count("reduce_scatter", (self.size - 1) * tensor.nbytes // self.size)
        with self._waiting("reduce_scatter"):
            _reduce_scatter(part, tensor.contiguous(), group=self.handle)
        return part

    def all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Exchange parts: of ``tensor`` [sum(send)], ``send[r]`` elements go to rank r; ``receive[r]`` come from it: [sum(receive)].

        Sends the bytes of what goes to others.
        """
        if self.size == 1:
            return tensor
        received = tensor.new_empty(sum(receive))
        self._count("all_to_all", (sum(send) - send[self.rank]) * tensor.element_size())
        begin = time.perf_counter()
        with self._waiting("all_to_all"):
            dist.all_to_all_single(received, tensor.contiguous(), list(receive), list(send), group=self.handle)
        if self.axis in PACK_AXES and tensor.device.type == "cpu":
            self.traffic.exchange_seconds += time.perf_counter() - begin
        return received

    def start_reduce(self, tensor: Tensor, owner: int) -> Pending | None:
        """Begin to sum ``tensor`` in place into rank ``owner`` of the group; ``wait`` ends it. Sends B (n - 1) / n in the mean."""
        if self.size == 1:
            return None
        self._count("reduce", (self.size - 1) * tensor.nbytes // self.size)
        return self._pending("reduce", dist.reduce(tensor, dst=self.ranks[owner], group=self.handle, async_op=True))

    def start_broadcast(self, tensor: Tensor, owner: int) -> Pending | None:
        """Begin to copy ``tensor`` of rank ``owner`` of the group into that of every rank. Sends B (n - 1) / n in the mean."""
        if self.size == 1:
            return None
        self._count("broadcast", (self.size - 1) * tensor.nbytes // self.size)
        return self._pending("broadcast", dist.broadcast(tensor, src=self.ranks[owner], group=self.handle, async_op=True))

    def send(self, tensor: Tensor, to: int) -> None:
        """Send to rank ``to`` of the group, which receives. Sends B."""
        self._count("send", tensor.nbytes)
        with self.activity.waiting(self.activity.collective("send", self.axis, [self.ranks[to]])):
            dist.send(tensor.contiguous(), self.ranks[to], group=self.handle)

    def receive(self, tensor: Tensor, source: int) -> Tensor:
        """Fill ``tensor`` with what rank ``source`` of the group sends; returns it when all of it is there."""
        with self.activity.waiting(self.activity.collective("receive", self.axis, [self.ranks[source]])):
            dist.recv(tensor, self.ranks[source], group=self.handle)
            synchronize(tensor.device)
        return tensor

    def start_rotate(self, tensor: Tensor, shape: Sequence[int]) -> tuple[Tensor, list[Pending]]:
        """Begin to send ``tensor`` to the next rank and to receive the previous rank's, of ``shape`` and equal dtype. Sends B.

        Returns what will have been received once every work's ``wait`` has ended; ``tensor`` must not change before.
        """
        if self.size == 1:
            return tensor, []
        received = tensor.new_empty(shape)
        self._count("rotate", tensor.nbytes)
        # In one batch, or nccl waits for a receive that is not yet posted. Without elements too: the first batch needs all ranks.
        following, previous = self.ranks[(self.rank + 1) % self.size], self.ranks[(self.rank - 1) % self.size]
        sending = dist.P2POp(dist.isend, tensor.contiguous(), following, self.handle)
        works = dist.batch_isend_irecv([sending, dist.P2POp(dist.irecv, received, previous, self.handle)])
        return received, [self._pending("rotate", work) for work in works]

    def _waiting(self, collective: str) -> AbstractContextManager[None]:
        return self.activity.waiting(self._next(collective))

    def _pending(self, collective: str, work: dist.Work) -> Pending:
        return Pending(work, self._next(collective), self.activity)

    def _next(self, collective: str) -> Collective:
        return self.activity.collective(collective, self.axis, self.ranks)

    def _count(self, collective: str, sent: int) -> None:
        self.traffic.sent[self.axis, collective] += sent
        self.traffic.calls[self.axis, collective] += 1
