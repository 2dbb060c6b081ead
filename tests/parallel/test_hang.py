"""Who is named, by reports made up for the purpose; tests/train/test_hangs.py has real ranks."""

import pytest

from megatron_ext.parallel.activity import Collective, Moment
from megatron_ext.parallel.hang import HangWatch, Report, waited_for

DP = Collective("all_reduce", "dp", (0, 1, 2, 3), 5)
WORLD = Collective("sum", "world", (0, 1, 2, 3), 9)


def moment(collective: Collective | None = None, phase: str = "forward", step: int = 4) -> Moment:
    return Moment(step, phase, None, collective)


@pytest.mark.parametrize(
    ("moments", "late"),
    [
        ([moment(DP), moment(), moment(DP), moment(DP)], [1]),
        ([moment(DP), moment(DP), moment(WORLD), moment(DP)], [2]),
        ([moment(DP), moment(DP._replace(number=4)), moment(DP), moment(DP)], [1]),
        # A line of waits: 3 waits for 2 in their group, all others for 3 or for those who wait for it.
        ([moment(DP), moment(DP), moment(), moment(Collective("all_reduce", "tp", (2, 3), 1))], [2]),
        # Two against two: nobody can say who is wrong.
        ([moment(DP), moment(DP), moment(WORLD), moment(WORLD)], [0, 1, 2, 3]),
        # The others wait for rank 1 through one that waits for a message of it.
        ([moment(Collective("receive", "pp", (1,), 3)), moment(), moment(DP), moment(DP)], [1]),
    ],
)
def test_those_that_others_wait_for_are_found(moments: list[Moment], late: list[int]) -> None:
    assert waited_for(dict(enumerate(moments))) == late


class Clock:
    """A run of four ranks on a clock of its own."""

    def __init__(self, timeout: float, collective_timeout: float = 1800.0, asynchronous: bool = False) -> None:
        self.watch, self.now, self.moves = HangWatch(timeout, collective_timeout, asynchronous), 0.0, 0

    def steps(self, count: int, seconds: float) -> None:
        """Whole steps of so many seconds, in the middle of which all wait for rank 1."""
        for step in range(1, count + 1):
            for phase in ("data", "optimizer"):
                self.moves += 1
                assert self.stand(seconds / 2, [moment(DP, phase, step), *[moment(None, phase, step)] * 3]) is None

    def stand(self, seconds: float, moments: list[Moment]) -> str | None:
        """What is said when nothing moves for so long."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.5
            hang = self.watch.judge({rank: Report(self.moves, each) for rank, each in enumerate(moments)}, self.now)
            if hang:
                return f"{self.now:.0f} rank {hang.ranks[0]} {hang.what}"
        return None


STUCK = [moment(DP, step=20), moment(None, "data", 20), moment(DP, step=20), moment(DP, step=20)]


def test_a_rank_that_stands_still_is_named_with_what_all_do() -> None:
    clock = Clock(10.0)
    clock.steps(5, 0.5)
    clock.moves, begin = 99, clock.now
    said = clock.stand(60, STUCK)
    assert said is not None and clock.now - begin == pytest.approx(11, abs=0.6)
    assert "rank 1 has not moved for 10 s: step 20, data. ranks 0, 2, 3: step 20, forward, in all_reduce (dp of ranks 0, 1, 2, 3" in said


def test_slow_steps_raise_the_limit_and_the_collective_bounds_it() -> None:
    clock = Clock(10.0)
    clock.steps(5, 30.0)
    assert clock.watch.limit() == 300.0
    clock.moves = 99
    assert clock.stand(290, STUCK) is None and clock.stand(20, STUCK) is not None
    clock = Clock(10.0, collective_timeout=200.0)
    clock.steps(5, 30.0)
    assert clock.watch.limit() == 160.0


def test_the_first_step_may_take_longer() -> None:
    clock = Clock(10.0)
    assert clock.stand(39, STUCK) is None and clock.stand(3, STUCK) is not None


def test_who_does_not_wait_or_train_is_left_alone() -> None:
    clock = Clock(10.0)
    assert clock.stand(1000, [moment(None)] * 4) is None, "all compute"
    assert clock.stand(1000, [moment(DP), moment(DP), moment(DP), moment(None, "", 0)]) is None, "one has not begun"
    clock.moves += 1
    assert clock.stand(100, [moment(DP), moment(), moment(), moment()]) is not None


@pytest.mark.parametrize("phase", ["start", "load", "end"])
def test_what_comes_before_and_after_the_steps_is_judged_but_may_take_longer(phase: str) -> None:
    clock = Clock(10.0)
    clock.steps(5, 0.5)
    clock.moves += 1
    stuck = [moment(WORLD, phase), moment(None, phase), moment(WORLD, phase), moment(WORLD, phase)]
    assert clock.stand(39, stuck) is None
    said = clock.stand(3, stuck)
    assert said is not None and f"rank 1 has not moved for 40 s: step 4, {phase}. ranks 0, 2, 3" in said


QUEUED = [moment(phase="backward"), moment(), moment(phase="optimizer"), moment(phase="optimizer")]
"""Of hosts that gave their devices the work, of which that of rank 1 does not come."""


def test_where_collectives_return_at_once_nobody_needs_to_say_that_it_waits() -> None:
    assert Clock(10.0).stand(5000, QUEUED) is None
    clock = Clock(10.0, asynchronous=True)
    clock.steps(5, 0.5)
    # Rank 1 stood still first, then rank 0, which waits for it without a word; the others are past their own work.
    reports = {rank: Report(100, each) for rank, each in enumerate(QUEUED)}
    for late, now in ((1, 0.0), (0, 1.0)):
        reports[late] = Report(101, reports[late].moment)
        assert clock.watch.judge(reports, clock.now + now) is None
    hang = clock.watch.judge(reports, clock.now + 11.5)
    assert hang is not None and hang.ranks == [1, 0] and hang.limit == 10.0
    assert hang.what.startswith("has not moved for 12 s: step 4, forward. rank 0: step 4, backward; ranks 2, 3: step 4, optimizer")


def test_where_collectives_return_at_once_slow_runs_are_left_alone() -> None:
    clock = Clock(10.0, asynchronous=True)
    clock.steps(5, 30.0)
    clock.moves += 1
    assert clock.stand(290, QUEUED) is None, "ten median steps"
    for phase in ("data", "save", "start"):
        clock.moves += 1
        assert clock.stand(5000, [moment(phase=phase)] * 4) is None, "nobody waits for a device"
    assert Clock(10.0, asynchronous=True).stand(39, QUEUED) is None, "the first step compiles kernels"


def test_a_silent_rank_is_named_before_those_that_wait() -> None:
    watch = HangWatch(10.0, 1800.0)
    reports = {rank: Report(1, moment(DP)) for rank in range(4)}
    assert watch.judge(reports, 0.0, silent=[2]) is None
    hang = watch.judge(reports, 50.0, silent=[2])
    assert hang is not None and hang.ranks == [2] and "is silent for 50 s: step 4, forward, in all_reduce" in hang.what
    hang = watch.judge(reports, 50.0)
    assert hang is not None and hang.ranks == [0, 1, 2, 3] and "for 50 s, and all ranks wait for each other: step 4" in hang.what
