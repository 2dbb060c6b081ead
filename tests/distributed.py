"""Real gloo ranks for tests, new ones for each function: forks of a process that has already imported what they need."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Protocol

TIMEOUT_SECONDS = 240


class RunRanks(Protocol):
    """``run_ranks(size, function, *arguments)``: results of ``function(world, *arguments)`` on real gloo ranks, by rank."""

    def __call__(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]: ...


class RankError(AssertionError):
    """A function failed on a rank."""

    def __init__(self, rank: int, trace: str) -> None:
        super().__init__(f"rank {rank} failed:\n{trace}")
        self.rank, self.trace = rank, trace


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(world, *arguments)`` on ``size`` processes in one gloo group; the function must be importable.

    Ranks see this process's environment and write where it writes. Returns the results by rank.
    Raises RankError with the failing rank's own traceback; the others, which may wait for it in a collective, are killed.
    """
    context = multiprocessing.get_context("forkserver")
    # The second is what drawing weights on the meta device imports, for seconds.
    context.set_forkserver_preload(["megatron_ext.train.run", "torch._dynamo"])
    # Connections travel to the new process as whatever file they hold.
    outputs = [Connection(os.dup(descriptor), readable=False) for descriptor in (1, 2)]
    processes: list[ForkServerProcess] = []
    connections: list[Connection] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(size):
                ours, theirs = context.Pipe()
                connections.append(ours)
                start = (rank, size, str(Path(folder) / "store"), dict(os.environ), outputs, theirs, function, arguments)
                processes.append(context.Process(target=_rank_main, args=start, daemon=True))
                processes[-1].start()
                theirs.close()
            results = _results(connections)
            for connection in connections:
                connection.send(None)
            for process in processes:
                process.join(timeout=5)
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()
            for connection in connections + outputs:
                connection.close()


def _rank_main(
    rank: int,
    size: int,
    store: str,
    environment: dict[str, str],
    outputs: list[Connection],
    connection: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    """Join the group, run the function and answer with (True, its result) or (False, its traceback)."""
    for descriptor, output in enumerate(outputs, 1):
        os.dup2(output.fileno(), descriptor)
    ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_SIZE": size}
    os.environ.clear()
    os.environ.update(environment | {name: str(value) for name, value in ours.items()} | {"DS_ACCELERATOR": "cpu"})
    import torch
    import torch.distributed as dist

    from megatron_ext.parallel.world import World

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timedelta(seconds=60))
    try:
        answer = (True, function(World(rank, size, torch.device("cpu")), *arguments))
    except BaseException:
        answer = (False, traceback.format_exc())
    connection.send(answer)
    # Tensors travel as files of this process: they must be read before it ends.
    connection.recv()
    dist.destroy_process_group()


def _results(connections: list[Connection]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(connections):
        # Whichever rank answers first: the others may be waiting for one that failed.
        waiting = {connection: rank for rank, connection in enumerate(connections) if rank not in results}
        ready = wait(list(waiting), TIMEOUT_SECONDS)
        if not ready:
            raise TimeoutError(f"ranks {sorted(waiting.values())} of {len(connections)} did not answer within {TIMEOUT_SECONDS} s")
        for connection in ready:
            good, value = _answer(connection)
            if not good:
                raise RankError(waiting[connection], value)
            results[waiting[connection]] = value
    return [results[rank] for rank in range(len(connections))]


def _answer(connection: Connection) -> tuple[bool, Any]:
    try:
        return connection.recv()
    except EOFError:
        return False, "the process ended without an answer"
