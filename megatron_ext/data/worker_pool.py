"""Apply a function to a stream of items in other processes, and get the results in order."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from megatron_ext.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

_END = object()
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
    with ExitStack() as stack:
        yield from _run(lambda: stack.enter_context(closing(_Worker(function))), workers, iter(items))


def _run(start: Callable[[], "_Worker"], workers: int, items: Iterator[Any]) -> Iterator[Any]:
    idle: list[_Worker] = []
    busy: dict[Connection, tuple[_Worker, int]] = {}
    done: dict[int, Any] = {}
    sent = returned = 0
    item = next(items, _END)
    while item is not _END or busy:
        if item is not _END and sent - returned < AHEAD * workers and (idle or len(busy) < workers):
            worker = idle.pop() if idle else start()  # little input needs few workers
            worker.connection.send(item)
            busy[worker.connection] = worker, sent
            sent, item = sent + 1, next(items, _END)
            continue
        for connection in wait(list(busy)):
            worker, number = busy.pop(connection)
            done[number] = worker.receive()
            idle.append(worker)
        while returned in done:
            yield done.pop(returned)
            returned += 1


class _Worker:
    """A process that answers each item with a result or an exception.

    It is a fresh interpreter: a fork would copy locks that the parent's threads hold and its ends of other workers' pipes, and
    ``multiprocessing`` would first run the parent's main module again, with all that it imports.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.connection, there = multiprocessing.Pipe()
        number = there.fileno()
        program = f"from {__name__} import serve; serve({number})"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen([sys.executable, "-c", program], pass_fds=[number], env=environment, stdin=subprocess.DEVNULL)
        there.close()
        self.connection.send(function)

    def receive(self) -> Any:
        """The result of the last item that was sent."""
        try:
            result, error = self.connection.recv()
        except (EOFError, ConnectionError) as broken:
            code = self._process.wait()
            raise DataError(f"a worker died with exit code {code} (-9: killed, often for want of memory)") from broken
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        self.connection.close()


def serve(file_descriptor: int) -> None:
    """Loop of a worker: receive a function, then items, until the parent closes its end or is gone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads in each of the workers would only wait for each other
    connection = Connection(file_descriptor)
    try:
        function = connection.recv()
        while True:
            connection.send(_answer(function, connection.recv()))
    except (EOFError, ConnectionError, KeyboardInterrupt):
        return


def _answer(function: Callable[[Any], Any], item: Any) -> tuple[Any, Exception | None]:
    try:
        return function(item), None
    except Exception as error:
        return None, error
