"""Apply a function to a stream of items in other processes, and get the results in order."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from megatron_ext.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 4  # results for each worker that may wait for an item that takes longer


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """``map(function, items)``, computed by ``workers`` processes.

    Each worker has one item at a time, so that memory is bounded by a few items for each, and the next one is read from ``items`` while
    they work. A worker ends when its parent does, however that ends.

    Args:
        function: sent once to each worker; must be importable there.
        items: anything that can be sent to another process.
        workers: 1 computes in this process.

    Raises:
        DataError: a worker was killed.
        Exception: whatever ``function`` raised in a worker.
    """
    if workers == 1:
        yield from map(function, items)
        return
    pool = [_Worker(function) for _ in range(workers)]
    try:
        yield from _run(pool, iter(items))
    finally:
        for worker in pool:
            worker.stop()


def _run(pool: list["_Worker"], items: Iterator[Any]) -> Iterator[Any]:
    idle = list(pool)
    busy: dict[Connection, tuple[_Worker, int]] = {}
    done: dict[int, Any] = {}
    sent = returned = 0
    waiting = next(items, None)
    while waiting is not None or busy or done:
        if idle and waiting is not None and sent - returned < AHEAD * len(pool):
            worker = idle.pop()
            worker.connection.send(waiting)
            busy[worker.connection] = worker, sent
            sent, waiting = sent + 1, next(items, None)
            continue
        for connection in wait(list(busy)):
            worker, number = busy.pop(connection)
            done[number] = worker.receive()
            idle.append(worker)
        while returned in done:
            yield done.pop(returned)
            returned += 1


class _Worker:
    """A process that answers each item with a result or an exception."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        # A fresh interpreter: a fork would copy locks of the parent's threads, and its ends of the other workers' pipes.
        context = multiprocessing.get_context("spawn")
        self.connection, there = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(function, there), daemon=True)
        self.process.start()
        there.close()

    def receive(self) -> Any:
        """The result of the last item that was sent."""
        try:
            result, error = self.connection.recv()
        except (EOFError, ConnectionError) as broken:
            self.process.join()
            raise DataError(f"a worker died with exit code {self.process.exitcode} (-9: killed, often for want of memory)") from broken
        if error is not None:
            raise error
        return result

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self.process.terminate()
        self.process.join()
        self.connection.close()


def _serve(function: Callable[[Any], Any], connection: Connection) -> None:
    """Loop of a worker, until the parent closes its end or is gone."""
    while True:
        try:
            item = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            answer = function(item), None
        except Exception as error:
            answer = None, error
        try:
            connection.send(answer)
        except ConnectionError:
            return
