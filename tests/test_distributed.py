"""Ranks of tests: results by rank, real collectives, their environment and output, and a failing rank's own traceback."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_ext.parallel.world import World
from tests.distributed import RankError, RunRanks


def _sum_of_ranks(world: World, offset: int) -> int:
    value = torch.tensor([world.rank + offset])
    dist.all_reduce(value)
    return int(value)


def _fail_on_last(world: World) -> None:
    if world.rank == world.size - 1:
        raise ValueError("the last rank gives up")
    world.barrier()


def _end_without_answer(world: World) -> None:
    os._exit(3)


def _say(world: World) -> str | None:
    os.write(1 + world.rank, f"rank {world.rank}\n".encode())
    return os.environ.get("SAID")


def test_results_come_from_real_collectives(run_ranks: RunRanks) -> None:
    assert run_ranks(2, _sum_of_ranks, 10) == [21, 21]


def test_a_failing_rank_shows_its_traceback_and_nothing_waits_for_it(run_ranks: RunRanks) -> None:
    with pytest.raises(RankError, match="rank 1 failed(.|\n)*the last rank gives up"):
        run_ranks(2, _fail_on_last)
    with pytest.raises(RankError, match="ended without an answer"):
        run_ranks(1, _end_without_answer)
    assert run_ranks(2, _sum_of_ranks, 0) == [1, 1]


def test_ranks_see_the_environment_and_write_where_the_test_writes(
    run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("SAID", "now")
    assert run_ranks(2, _say) == ["now", "now"]
    assert capfd.readouterr() == ("rank 0\n", "rank 1\n")


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_ranks_leave_nothing_open(run_ranks: RunRanks) -> None:
    run_ranks(2, _sum_of_ranks, 0)
    before = _open_files()
    for _ in range(3):
        run_ranks(2, _sum_of_ranks, 0)
    assert _open_files() <= before
