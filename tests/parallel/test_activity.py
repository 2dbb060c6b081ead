import time

import torch
import torch.distributed as dist

from megatron_ext.parallel import group
from megatron_ext.parallel.activity import Activity, Collective, Moment
from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.hang import Report
from megatron_ext.parallel.world import World
from tests.distributed import RunRanks


def test_packs_are_read_in_one_phase_and_computed_in_the_next() -> None:
    activity = Activity()

    class Slow:
        def __len__(self) -> int:
            return 2

        def __iter__(self):
            for name in "ab":
                seen.append(activity.now)
                yield name

    seen: list[Moment] = []
    activity.begin("data", step=3)
    for name in activity.packs(Slow()):
        seen.append(activity.now)
        activity.backward()
        seen.append(activity.now)
        assert name in "ab"
    assert [(moment.step, moment.phase, moment.pack) for moment in seen] == [
        (3, phase, (number, 2)) for number in (1, 2) for phase in ("data", "forward", "backward")
    ]
    assert str(seen[2]) == "step 3, backward of pack 1 of 2"


def test_work_is_counted_without_waiting_and_other_phases() -> None:
    activity = Activity()
    activity.begin("evaluate", step=1)
    time.sleep(0.05)
    activity.begin("data", step=2)
    time.sleep(0.05)
    activity.begin("forward")
    with activity.waiting(activity.collective("all_reduce", "dp", [0, 1])):
        assert str(activity.now) == "step 2, forward, in all_reduce (dp of ranks 0, 1, call 1)"
        time.sleep(0.2)
    activity.begin("optimizer")
    time.sleep(0.2)
    assert 0.05 <= activity.work_seconds() < 0.15
    assert activity.work_seconds() == 0


def test_a_report_travels_as_text() -> None:
    for moment in (Moment(), Moment(4, "forward", (1, 2)), Moment(4, "plan", None, Collective("sum", "world", (0, 1, 2), 7))):
        assert Report.decode(Report(5, moment).encode()) == Report(5, moment)


def test_progress_within_a_moment_counts_as_a_move() -> None:
    activity = Activity()
    activity.begin("save", step=3)
    moves = [activity.moves]
    for name in activity.each("ab"):
        moves.append(activity.moves)
        assert name in "ab" and activity.now == Moment(3, "save")
    activity.move()
    assert [*moves, activity.moves] == list(range(moves[0], moves[0] + 4))
    with activity.within("load"):
        assert activity.now == Moment(3, "load")
    assert activity.now == Moment(3, "save")


def reads_late(world: World) -> list[str]:
    """What rank 0 was in while it read results that rank 1 had not sent: as on a GPU, collectives return at once and reading waits."""
    pending: list[dist.Work] = []
    seen: list[str] = []
    real = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "broadcast")}
    for name, run in real.items():
        setattr(dist, name, lambda *arguments, run=run, **named: pending.append(run(*arguments, async_op=True, **named)))
    read = torch.Tensor.cpu

    def cpu(self: torch.Tensor) -> torch.Tensor:
        if world.rank == 1:
            time.sleep(0.1)
        seen.append(str(world.activity.now.collective))
        while pending:
            pending.pop().wait()
        return read(self)

    torch.Tensor.cpu = cpu
    try:
        assert world.sum(torch.ones(1)).tolist() == [2.0]
        assert world.max(torch.tensor([float(world.rank)])).tolist() == [1.0]
        assert world.gather(f"rank {world.rank}") == ["rank 0", "rank 1"]
        assert world.from_main([4, 5] if world.is_main else None, 1) == [4, 5]
    finally:
        torch.Tensor.cpu = read
        for name, run in real.items():
            setattr(dist, name, run)
    return seen


def test_reading_the_result_of_a_collective_counts_as_waiting_for_it(run_ranks: RunRanks) -> None:
    for seen in run_ranks(2, reads_late):
        assert "None" not in seen
        assert {name.split(" (")[0] for name in seen} == {"sum", "max", "gather", "broadcast"}


def receives(world: World) -> list[str]:
    """What a rank that receives is in while it waits until the device has what was sent."""
    seen: list[str] = []
    group.synchronize = lambda device: seen.append(f"{device}: {world.activity.now.collective.name}")
    dp = Grid(world, GridShape(1, 2, 1)).dp
    if world.is_main:
        dp.send(torch.ones(1), 1)
    else:
        dp.receive(torch.zeros(1), 0)
    return seen


def test_a_receive_ends_when_all_is_there(run_ranks: RunRanks) -> None:
    assert run_ranks(2, receives) == [[], ["cpu: receive"]]


def waits(world: World) -> tuple[list[str], int]:
    """What rank 0 was seen to wait in while rank 1 came late to each collective, and how often it moved."""
    seen: list[str] = []
    grid = Grid(world, GridShape(1, 2, 1))
    real = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "broadcast")}

    def noting(name: str):
        def call(*arguments, **named):
            collective = world.activity.now.collective
            seen.append(f"{name}: {collective.name} {collective.axis} {collective.number}" if collective else f"{name}: none")
            return real[name](*arguments, **named)

        return call

    for name in real:
        setattr(dist, name, noting(name))
    world.barrier()
    world.max(torch.zeros(1))
    world.gather("x")
    grid.dp.all_reduce(torch.ones(2))
    grid.dp.all_reduce(torch.ones(2))
    pending = grid.dp.start_broadcast(torch.ones(2), 0)
    before = world.activity.moves
    pending.wait()
    return seen, world.activity.moves - before


def test_every_wait_for_others_is_known(run_ranks: RunRanks) -> None:
    for seen, moved in run_ranks(2, waits):
        assert seen[:2] == ["all_reduce: sum world 1", "all_reduce: max world 1"]
        assert seen[2:4] == ["all_gather: gather world 1", "all_gather: gather world 2"]
        assert seen[4:6] == ["all_reduce: all_reduce dp 1", "all_reduce: all_reduce dp 2"]
        assert seen[6] == "broadcast: none" and moved == 2, "what goes on beside is waited for later"
