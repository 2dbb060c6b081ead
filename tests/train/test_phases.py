"""The phases that a rank goes through, on every kind of engine."""

from itertools import groupby
from pathlib import Path

import pytest

from megatron_ext.parallel.activity import Activity, Moment
from megatron_ext.parallel.world import World
from megatron_ext.train.engine import Engine
from tests.distributed import RunRanks
from tests.train.tiny_run import train, write_run


def phases(world: World, config: Path, overrides: list[str]) -> tuple[list[str], list[str], list[float]]:
    """Of a run: its phases in order, without repetitions; the collectives it waited in; the work of the ranks in the last step."""
    seen: list[str] = []
    waits: list[str] = []
    work: list[float] = []
    change, step = Activity._change, Engine.step

    def noting(self: Activity, moment: Moment) -> None:
        if self is world.activity:
            seen.append(f"{moment.step} {moment.phase}")
            waits.extend([moment.collective.name] if moment.collective and moment.phase else [])
        change(self, moment)

    def timed(self: Engine, *arguments: object) -> object:
        result = step(self, *arguments)
        work[:] = result.work_seconds
        return result

    Activity._change, Engine.step = noting, timed
    train(world, config, overrides)
    return [phase for phase, _ in groupby(seen)], waits, work


@pytest.mark.parametrize("overrides", [[], ["parallel.pp=2"], ["optimizer.sharding=zero1"]], ids=["whole_tensor", "pipeline", "zero1"])
def test_a_run_tells_its_phases_in_order(run_ranks: RunRanks, tmp_path: Path, overrides: list[str]) -> None:
    config = write_run(tmp_path, train__steps=1, schedule__warmup_steps=1)
    for seen, waits, work in run_ranks(2, phases, config, overrides):
        order = [
            "0 evaluate",
            "1 data",
            "1 plan",
            "1 forward",
            "1 backward",
            "1 optimizer",
            "1 exchange",
            "1 record",
            "1 evaluate",
            "1 save",
            "1 end",
        ]
        places = [seen.index(phase) for phase in order if phase != "1 exchange"]
        assert places == sorted(places), seen
        assert "1 exchange" in seen and seen[-1] == "1 end"
        assert {"broadcast", "sum", "gather"} <= set(waits)
        assert len(work) == 2 and all(0 < seconds < 60 for seconds in work)
