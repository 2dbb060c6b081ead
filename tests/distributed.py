"""Real gloo ranks for tests: pools of processes that live for the session and are handed functions."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 240


def _rank_main(rank: int, size: int, store: str, connection: Connection) -> None:
    """Join the group, then run what arrives until None does."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_SIZE=str(size), DS_ACCELERATOR="cpu")
    import torch
    import torch.distributed as dist

    from megatron_ext.parallel.world import World

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timedelta(seconds=60))
    world = World(rank, size, torch.device("cpu"))
    while (task := connection.recv()) is not None:
        function, arguments = task
        try:
            connection.send((True, function(world, *arguments)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class RankPool:
    """``size`` processes in one gloo group.

    A pool whose rank failed cannot be used again: its other ranks may wait in a collective.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank_main, args=(rank, size, str(Path(self._folder.name) / "store"), theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(world, *arguments)`` on every rank; returns the results by rank, or raises with the failing rank's own traceback."""
        for connection in self._connections:
            connection.send((function, arguments))
        results: dict[int, Any] = {}
        while len(results) < self.size:
            # Whichever rank answers first: the others may be waiting for one that failed.
            waiting = {c: rank for rank, c in enumerate(self._connections) if rank not in results}
            ready = wait(list(waiting), TIMEOUT_SECONDS)
            if not ready:
                raise TimeoutError(f"ranks {sorted(waiting.values())} of {self.size} did not answer within {TIMEOUT_SECONDS} s")
            for connection in ready:
                good, value = connection.recv()
                if not good:
                    raise RankError(waiting[connection], value)
                results[waiting[connection]] = value
        return [results[rank] for rank in range(self.size)]

    @property
    def threads(self) -> int:
        """Of rank 0. Those of gloo's groups, three a group, look for work a hundred times a second."""
        return len(list(Path(f"/proc/{self._processes[0].pid}/task").iterdir()))

    def close(self) -> None:
        """End the ranks."""
        for connection, process in zip(self._connections, self._processes, strict=True):
            if process.is_alive():
                connection.send(None)
        for process in self._processes:
            process.join(timeout=2)
            process.kill()
        self._folder.cleanup()


class RankError(AssertionError):
    """A function failed on a rank."""

    def __init__(self, rank: int, trace: str) -> None:
        super().__init__(f"rank {rank} failed:\n{trace}")
        self.rank, self.trace = rank, trace


class RankPools:
    """Pools by size, made when first needed and ended when one of their ranks failed, ran many functions or made many groups.

    A grid's groups last as long as its process: idle ranks with hundreds of them would keep the cores busy.
    """

    def __init__(self, functions_per_pool: int = 12, threads_per_rank: int = 100) -> None:
        self._pools: dict[int, RankPool] = {}
        self._used: dict[int, int] = {}
        self._most = functions_per_pool
        self._most_threads = threads_per_rank

    def __call__(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run ``function(world, *arguments)`` on ``size`` ranks; the function must be importable. Returns the results by rank."""
        if size not in self._pools:
            self._pools[size] = RankPool(size)
        self._used[size] = self._used.get(size, 0) + 1
        try:
            results = self._pools[size].run(function, *arguments)
        except BaseException:
            self._discard(size)
            raise
        if self._used[size] >= self._most or self._pools[size].threads > self._most_threads:
            self._discard(size)
        return results

    def _discard(self, size: int) -> None:
        self._pools.pop(size).close()
        self._used.pop(size)

    def close(self) -> None:
        """End all ranks."""
        for size in list(self._pools):
            self._discard(size)
