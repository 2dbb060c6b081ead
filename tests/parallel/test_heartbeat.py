"""Real processes of which one fails, freezes or is killed: the others end soon and name it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_ext.parallel.heartbeat import _torch_collective
from megatron_ext.parallel.world import World
from tests.distributed import RunRanks

SCRIPT = """
import os, sys, time, signal
import torch, torch.distributed as dist
from megatron_ext.parallel import heartbeat as module
from megatron_ext.parallel.heartbeat import Heartbeat
from megatron_ext.parallel.world import World
what, watched = sys.argv[1], sys.argv[2] == "watched"
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", rank=rank, world_size=size)
world = World(rank, size, torch.device("cpu"))
heartbeat = Heartbeat(world, 3.0) if watched else None
victim = 0 if what.endswith("0") else size - 1
if "full" in sys.argv and rank != victim:
    sys.stdout = sys.stderr = open("/dev/full", "w")
if "closed" in sys.argv:
    sys.stderr.close()
if "blocked" in sys.argv:
    # A pipe that nobody reads, and that has no room left.
    module.LAST_WORDS_SECONDS = 3.0
    _, full = os.pipe()
    os.set_blocking(full, False)
    try:
        while True:
            os.write(full, bytes(4096))
    except BlockingIOError:
        os.set_blocking(full, True)
    sys.stderr = os.fdopen(full, "w")
try:
    if what == "end":
        if "frozen" in sys.argv:
            print("ready", flush=True)
            sys.stdin.readline()
        heartbeat.close()
        dist.destroy_process_group()
        sys.exit(0)
    if rank == victim:
        print("victim", os.getpid(), flush=True)
        if what == "raise":
            raise RuntimeError("the first line\\nthe second")
        os.kill(os.getpid(), signal.SIGKILL if what.startswith("kill") else signal.SIGSTOP)
    # The others wait in a collective that never comes to its end.
    if not what.startswith("kill"):
        dist.all_reduce(torch.ones(4))
    time.sleep(60)
except RuntimeError as error:
    if heartbeat:
        heartbeat.fail(error)
    raise
"""


def start(tmp_path: Path, what: str, watched: bool, size: int = 3, *more: str) -> list[subprocess.Popen[str]]:
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT, "utf-8")
    port = str(20000 + os.getpid() % 20000)
    environment = os.environ | {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": "0"}
    command = [sys.executable, str(script), what, "watched" if watched else "alone", *more]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, env=environment | {"RANK": str(rank)}, **pipes) for rank in range(size)]


def finish(ranks: list[subprocess.Popen[str]], timeout: float) -> list[tuple[int, str]]:
    """Exit code and standard error of each rank; one that does not end in time is killed, and has code None."""
    results = []
    end = time.monotonic() + timeout
    for rank in ranks:
        try:
            _, errors = rank.communicate(timeout=max(0.1, end - time.monotonic()))
            results.append((rank.returncode, errors))
        except subprocess.TimeoutExpired:
            rank.send_signal(signal.SIGKILL)
            results.append((None, rank.communicate()[1]))
    return results


def test_a_rank_that_raises_ends_all_with_its_own_traceback_first(tmp_path: Path) -> None:
    results = finish(start(tmp_path, "raise", watched=True), 25)
    assert [code for code, _ in results] == [1, 1, 1]
    assert "RuntimeError: the first line" in results[2][1] and "Traceback" in results[2][1]
    for _, errors in results[:2]:
        assert "rank 2 on host" in errors and "failed with RuntimeError: the first line;" in errors
        assert errors.count("rank 2 on host") == 1


@pytest.mark.parametrize(("what", "victim"), [("stop", 2), ("stop0", 0), ("kill", 2), ("kill0", 0)])
def test_a_rank_that_falls_silent_is_named_in_time(tmp_path: Path, what: str, victim: int) -> None:
    ranks = start(tmp_path, what, watched=True)
    others = [rank for number, rank in enumerate(ranks) if number != victim]
    begin = time.monotonic()
    results = finish(others, 30)
    assert time.monotonic() - begin < 25
    ranks[victim].kill()
    ranks[victim].communicate()
    for code, errors in results:
        assert code == 1
        assert f"rank {victim} on host" in errors
        assert ("cannot be reached" if victim == 0 else "has not been heard for") in errors


@pytest.mark.parametrize("console", ["full", "closed", "blocked"])
def test_a_rank_that_cannot_say_why_it_ends_still_ends(tmp_path: Path, console: str) -> None:
    ranks = start(tmp_path, "stop", True, 2, console)
    [(code, _)] = finish(ranks[:1], 20)
    ranks[1].kill()
    ranks[1].communicate()
    assert code == 1


def test_a_good_end_is_silent(tmp_path: Path) -> None:
    assert [(code, "host" in errors) for code, errors in finish(start(tmp_path, "end", watched=True), 25)] == [(0, False)] * 3


def test_ranks_that_were_all_frozen_and_go_on_accuse_nobody(tmp_path: Path) -> None:
    ranks = start(tmp_path, "end", True, 3, "frozen")
    assert [rank.stdout.readline() for rank in ranks] == ["ready\n"] * 3
    judge, *others = ranks
    # The judge stops last and goes on first, so that it knows every beat, and sees no other when it goes on.
    for rank in others:
        rank.send_signal(signal.SIGSTOP)
    time.sleep(1.0)
    judge.send_signal(signal.SIGSTOP)
    time.sleep(4.0)
    judge.send_signal(signal.SIGCONT)
    time.sleep(0.3)
    for rank in others:
        rank.send_signal(signal.SIGCONT)
    for rank in ranks:
        rank.stdin.write("go on\n")
        rank.stdin.flush()
    assert [(code, "host" in errors) for code, errors in finish(ranks, 25)] == [(0, False)] * 3


def seen_waiting(world: World) -> str:
    """What another thread of rank 0 sees of a receive that somebody else began, which rank 1 answers late."""
    thread, seen = threading.get_ident(), []
    watcher = threading.Timer(0.5, lambda: seen.append(_torch_collective(thread)))
    watcher.start()
    if world.rank == 0:
        dist.recv(torch.zeros(1), 1)
    else:
        time.sleep(1.0)
        dist.send(torch.zeros(1), 0)
    watcher.join()
    return seen[0]


def test_collectives_that_others_began_are_seen_too(run_ranks: RunRanks) -> None:
    assert run_ranks(2, seen_waiting) == ["recv", ""]


def test_without_it_the_others_wait(tmp_path: Path) -> None:
    results = finish(start(tmp_path, "stop", watched=False), 15)
    assert [code for code, _ in results] == [None, None, None]
