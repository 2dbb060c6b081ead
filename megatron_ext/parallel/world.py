"""The ranks of a run, and the few things they say to each other outside the model."""

import json
import os
import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.errors import ConfigError
from megatron_ext.parallel.activity import Activity
from megatron_ext.parallel.device import activate, collective_backend, local_device

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """All ranks of the run, as one of them sees them. Passed down, never global."""

    rank: int
    size: int
    device: torch.device
    activity: Activity = field(default_factory=Activity, compare=False, repr=False)
    """Of this rank; it is told of every wait."""

    @property
    def is_main(self) -> bool:
        """True on the rank that prints and writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            self.sum(torch.zeros(1))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a small tensor over all ranks, on the CPU in float64."""
        values = values.to(self.device, torch.float64)
        if self.size == 1:
            return values.cpu()
        with self._waiting("sum"):
            dist.all_reduce(values)
            return values.cpu()

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Largest values of a small tensor over all ranks, on the CPU in float64."""
        values = values.to(self.device, torch.float64)
        if self.size == 1:
            return values.cpu()
        values = values.clone()
        with self._waiting("max"):
            dist.all_reduce(values, dist.ReduceOp.MAX)
            return values.cpu()

    def any(self, flag: bool) -> bool:
        """True on every rank if ``flag`` is true on one."""
        return bool(self.sum(torch.tensor([float(flag)])) > 0)

    def gather(self, value: Any) -> list[Any]:
        """The JSON value of every rank, by rank, on every rank."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        with self._waiting("gather"):
            dist.all_gather(sizes, torch.tensor([len(text)], device=self.device))
            lengths = [int(size.cpu()) for size in sizes]
        padded = torch.nn.functional.pad(text, (0, max(lengths) - len(text)))
        texts = [torch.empty_like(padded) for _ in range(self.size)]
        with self._waiting("gather"):
            dist.all_gather(texts, padded)
            texts = [text.cpu() for text in texts]
        return [json.loads(bytes(text[:length].numpy())) for text, length in zip(texts, lengths, strict=True)]

    def from_main(self, numbers: list[int] | None, usual: int) -> list[int]:
        """The int32 numbers that rank 0 passed, on every rank. Sent at once if no more than ``usual``, which all ranks agree on."""
        if self.size == 1:
            assert numbers is not None, "rank 0 has them"
            return numbers
        first = torch.zeros(usual + 1, dtype=torch.int32)
        if numbers is not None:
            head = torch.tensor([len(numbers), *numbers[:usual]], dtype=torch.int32)
            first[: len(head)] = head
        first = self._broadcast(first)
        count = int(first[0])
        if count <= usual:
            return first[1 : count + 1].tolist()
        rest = torch.tensor(numbers[usual:], dtype=torch.int32) if numbers is not None else torch.zeros(count - usual, dtype=torch.int32)
        return first[1:].tolist() + self._broadcast(rest).tolist()

    def _broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(self.device)
        with self._waiting("broadcast"):
            dist.broadcast(tensor, src=0)
            return tensor.cpu()

    def _waiting(self, collective: str) -> AbstractContextManager[None]:
        return self.activity.waiting(self.activity.collective(collective, "world", range(self.size)))

    def on_main(self, value: Any) -> Any:
        """The JSON value that rank 0 passed, on every rank."""
        return self.gather(value if self.is_main else None)[0]


def launched_ranks() -> tuple[int, int]:
    """(rank, size) as the launcher says in RANK and WORLD_SIZE; (0, 1) without one.

    Raises:
        ConfigError: only one of the two is set, or they are not a rank of a world.
    """
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if (rank is None) != (size is None):
        raise ConfigError(f"RANK={rank} and WORLD_SIZE={size}: a launcher sets both, a single process neither")
    if rank is None or size is None:
        return 0, 1
    if not (rank.isdigit() and size.isdigit() and int(rank) < int(size)):
        raise ConfigError(f"RANK={rank} and WORLD_SIZE={size} are not a rank of a world")
    return int(rank), int(size)


def join_world(threads_per_rank: int | None = None, timeout: timedelta = COLLECTIVE_TIMEOUT) -> World:
    """Start torch.distributed as the launcher's environment says, or for this process alone.

    Args:
        threads_per_rank: CPU threads of this rank; None: the cores that this process may use, divided by the ranks of its machine.
        timeout: how long a collective waits for a rank.
    """
    rank, size = launched_ranks()
    local_size = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
    device = local_device()
    activate(device)
    torch.set_num_threads(threads_per_rank or max(1, len(os.sched_getaffinity(0)) // local_size))
    if not dist.is_initialized():
        backend = collective_backend(device)
        if "RANK" in os.environ:
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
        else:
            store = dist.FileStore(str(Path(tempfile.mkdtemp()) / "store"), 1)
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    return World(rank, size, device)
