"""Processes for benchmarks: ranks of a group that keep what they have set up between rounds."""

import multiprocessing
import os
import socket
import statistics
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_ext.parallel.world import World, join_world

State = dict[str, Any]


class Ranks:
    """``size`` processes in one group, one thread each unless told otherwise. ``run`` hands all of them a function.

    Args:
        size: number of ranks.
        threads: CPU threads of a rank.
    """

    def __init__(self, size: int, threads: int = 1) -> None:
        context = multiprocessing.get_context("spawn")
        port = _free_port()
        self._connections: list[Connection] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            context.Process(target=_work, args=(rank, size, port, threads, theirs), daemon=True).start()
            theirs.close()  # so that a rank that fails ends the wait for it
            self._connections.append(ours)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(world, state, *arguments)`` on every rank; ``state`` is a dictionary that the rank keeps. Results by rank."""
        for connection in self._connections:
            connection.send((function, arguments))
        return [connection.recv() for connection in self._connections]

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.send(None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _work(rank: int, size: int, port: int, threads: int, connection: Connection) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world: World = join_world(threads)
    state: State = {}
    while (task := connection.recv()) is not None:
        function, arguments = task
        connection.send(function(world, state, *arguments))
    os._exit(0)


def print_ratios(
    title: str,
    column: str,
    base: str,
    values: dict[str, Sequence[float]],
    unit: str,
    better: str,
    order: str = "the ways in turn in each",
    digits: int = 2,
) -> None:
    """A table of medians, and of the ratios to ``base`` within a round.

    Args:
        title: of the table.
        column: heading of the names.
        base: name of the row that the others are compared with.
        values: of each round, by name.
        unit: of the values.
        better: "more" or "less".
        order: of the rounds.
        digits: of the ratios, behind the point.
    """
    table = Table(title=title)
    for heading in (column, f"{unit} (median)", f"of {base}: min", "median", "max"):
        table.add_column(heading, justify="left" if heading == column else "right")
    for name, mine in values.items():
        ratios = sorted(a / b for a, b in zip(mine, values[base], strict=True))
        chosen = (ratios[0], statistics.median(ratios), ratios[-1])
        table.add_row(name, f"{statistics.median(mine):,.4g}", *(f"{ratio:.{digits}f}" for ratio in chosen))
    Console(width=110).print(table)
    print(f"{better} is better; {len(next(iter(values.values())))} rounds, {order}")
