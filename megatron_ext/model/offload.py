"""Tensors that autograd keeps, in host memory instead of the device's until backward needs them."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional

import torch
from torch import Tensor

from megatron_ext.parallel.device import HostTransfer


@contextmanager
def kept_on_host(transfer: HostTransfer) -> Iterator[None]:
    """Inside, what autograd saves is copied to host memory; backward gets it back with the same bits.

    Around blocks that are recomputed these are their inputs, because what is computed inside is saved by recomputation itself (offloaded
    activation checkpoints: Rajbhandari et al. 2020, arXiv:1910.02054, section 6.1). When backward takes one, the one that was saved
    before it begins to come back.
    """
    # Autograd holds ``keep`` as long as any of the copies: strong references would hold them all to the end of backward.
    last: weakref.ref[HostCopy] | None = None

    def keep(tensor: Tensor) -> HostCopy:
        nonlocal last
        copy = HostCopy(tensor, transfer, last)
        last = weakref.ref(copy)
        return copy

    with torch.autograd.graph.saved_tensors_hooks(keep, HostCopy.restore):
        yield


class HostCopy:
    """One tensor in host memory; ``before`` is needed next after it. Only autograd's graph holds it."""

    def __init__(self, tensor: Tensor, transfer: HostTransfer, before: Optional["weakref.ref[HostCopy]"]) -> None:
        self.tensor = transfer.to_host(tensor)
        self._transfer, self._before = transfer, before
        self._coming: Tensor | None = None

    def restore(self) -> Tensor:
        """The tensor on its device again."""
        self.begin()
        tensor, self._coming = self._coming, None
        assert tensor is not None, "it has begun"
        self._transfer.wait_for(tensor)
        if self._before is not None and (before := self._before()) is not None:
            before.begin()
        return tensor

    def begin(self) -> None:
        """Let the tensor come back, unless it does already."""
        if self._coming is None:
            self._coming = self._transfer.to_device(self.tensor)
