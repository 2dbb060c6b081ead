"""A pool of processes that answers in order, with bounded memory, and that dies with its parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from megatron_ext.data.worker_pool import AHEAD, ordered_map
from megatron_ext.errors import DataError


@dataclass(frozen=True)
class Slow:
    """Returns its item and its process; some items take longer, some fail."""

    def __call__(self, item: int) -> tuple[int, int]:
        if item == -1:
            raise DataError("item -1")
        if item == -9:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05 if item % 5 == 0 else 0)
        return item, os.getpid()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_are_in_order(workers: int) -> None:
    results = list(ordered_map(Slow(), range(23), workers))
    assert [item for item, _ in results] == list(range(23))
    processes = {process for _, process in results}
    assert processes == {os.getpid()} if workers == 1 else os.getpid() not in processes and len(processes) == workers


def test_no_items() -> None:
    assert list(ordered_map(Slow(), [], 2)) == []


def test_items_are_read_only_as_they_are_needed() -> None:
    read = []

    def items() -> Iterator[int]:
        for item in range(1000):
            read.append(item)
            yield item

    results = ordered_map(Slow(), items(), 2)
    for count in range(1, 30):
        next(results)
        assert len(read) <= count + 2 * AHEAD + 1
    results.close()


def test_exception_of_a_worker_is_raised_where_its_result_would_be() -> None:
    results = ordered_map(Slow(), [5, 1, -1, 2], 2)
    with pytest.raises(DataError, match="item -1"):
        list(results)


def test_killed_worker_is_an_error() -> None:
    with pytest.raises(DataError, match=r"a worker died with exit code -9"):
        list(ordered_map(Slow(), [1, 2, -9, 3], 2))


def test_workers_end_when_their_parent_is_killed() -> None:
    program = (
        "import itertools, time\n"
        "from tests.data.test_worker_pool import Slow\n"
        "from megatron_ext.data.worker_pool import ordered_map\n"
        "for _, process in ordered_map(Slow(), itertools.count(), 2):\n"
        "    print(process, flush=True)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = {int(parent.stdout.readline()) for _ in range(20)}
    assert len(workers) == 2 and all(is_running(worker) for worker in workers)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)


def is_running(process: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
