"""Ranks on this host as forks of one process that has imported what they need: a restart takes a second, not the imports of every rank."""

import ctypes
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess

from megatron_ext.train.started_run import StartedRun
from megatron_ext.train.supervision import RankEnd

PRELOADED = ["megatron_ext.train.run", "torch._dynamo"]
"""The second is what drawing weights on the meta device imports, for seconds."""
DIE_WITH_PARENT, NAME = 1, 15
"""PR_SET_PDEATHSIG and PR_SET_NAME of prctl(2)."""


class ForkedRun(StartedRun):
    """A run of forked ranks. CPUs only: forks of a process that has spoken to a CUDA driver cannot use it.

    Args:
        ranks: how many.
        port: on which rank 0 waits for the others.
        script: Python script and arguments of every rank.
        say: gets every line that is printed.
    """

    def __init__(self, ranks: int, port: int, script: Sequence[str], say: Callable[[str], None]) -> None:
        super().__init__(say)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        reading, writing = os.pipe()
        common = {"WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self._processes: list[ForkServerProcess] = []
        self._noted: set[int] = set()
        for rank in range(ranks):
            environment = dict(os.environ) | {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
            # A connection travels to the new process as whatever file it holds.
            output = Connection(os.dup(writing), readable=False)
            self._processes.append(context.Process(target=_rank_main, args=(environment, list(script), output), name=f"rank {rank}"))
            self._processes[-1].start()
            output.close()
        os.close(writing)
        self._read(os.fdopen(reading, "rb"), "localhost")

    def _poll(self) -> list[int | None]:
        codes = [process.exitcode for process in self._processes]
        ended = [rank for rank, code in enumerate(codes) if code is not None and rank not in self._noted]
        # Of those seen at once, one that was killed was the first: the others end because of it.
        for rank in sorted(ended, key=lambda rank: codes[rank]):
            self._noted.add(rank)
            self._note_end(RankEnd(rank, "localhost", codes[rank]))
        return codes

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _rank_main(environment: dict[str, str], script: list[str], output: Connection) -> None:
    """Become one rank: its session, output and environment, then the script as if it were started."""
    prctl = ctypes.CDLL(None).prctl
    prctl(DIE_WITH_PARENT, signal.SIGKILL)
    prctl(NAME, f"rank {environment['RANK']}".encode())
    os.setsid()
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    output.close()
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = script
    runpy.run_path(script[0], run_name="__main__")
