import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ext.config.run_options import LoggingOptions
from megatron_ext.parallel.grid import GridShape
from megatron_ext.parallel.world import World
from megatron_ext.report.events import read_events
from megatron_ext.train import packs
from megatron_ext.train.stragglers import StragglerWatch
from tests.distributed import RunRanks
from tests.train.tiny_run import records, train, write_run


def watch(pp: int, dp: int, **options: Any) -> StragglerWatch:
    """As rank 0 of a grid sees it, without the others."""
    world = SimpleNamespace(gather=lambda value: [f"host{rank}" for rank in range(pp * dp)])
    return StragglerWatch(SimpleNamespace(shape=GridShape(pp, dp, 1), world=world), LoggingOptions(**options))


def test_a_rank_is_told_about_once_in_a_row_and_again_later() -> None:
    each = watch(1, 4, straggler_steps=3)
    told = []
    for step in range(12):
        slow = 1.0 if step == 5 else 2.0
        record, found = each.look([1.0, 1.0, slow, 1.1])
        told += [(step, straggler.rank, straggler.host, straggler.steps) for straggler in found]
    assert told == [(2, 2, "host2", 3), (8, 2, "host2", 3)]
    assert record["slowest_rank"] == 2 and record["slowest_ratio"] == pytest.approx(2 / 1.05) and record["slow_steps"] == {"2": 11}


def test_ranks_are_compared_with_those_of_their_stage() -> None:
    record, found = watch(2, 3, straggler_steps=1).look([1.0, 1.0, 1.0, 5.0, 5.0, 5.5])
    assert found == [] and record == {"slowest_rank": 5, "slowest_ratio": 1.1, "slow_steps": {}}
    assert watch(1, 1).look([3.0]) == ({}, [])
    assert watch(1, 2).look([0.0, 0.0])[0]["slowest_ratio"] == 1.0


def slow_rank(world: World, config: Path) -> None:
    """Train; reading takes 0.5 s longer on rank 2."""
    real = packs.read_pack

    def read(*arguments: Any) -> Any:
        if world.rank == 2:
            time.sleep(0.5)
        return real(*arguments)

    packs.read_pack = read
    train(world, config)


def test_a_slow_rank_of_a_run_is_found_though_all_wait_for_it(run_ranks: RunRanks, tmp_path: Path) -> None:
    config = write_run(tmp_path, train__steps=5, logging__straggler_steps=3)
    run_ranks(3, slow_rank, config)
    steps = records(tmp_path / "run", "train")
    # The first step may be slow everywhere.
    assert [record["slowest_rank"] for record in steps[1:]] == [2] * 4 and steps[-1]["slow_steps"]["2"] >= 4
    (event,) = [event for event in read_events(tmp_path / "run") if event.event == "straggler"]
    assert event.step in (3, 4) and event.details["rank"] == 2 and event.details["ratio"] > 1.5 and event.details["host"]
