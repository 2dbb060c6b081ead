"""What a supervisor concludes, without processes."""

import torch

from megatron_ext.parallel.heartbeat import Heartbeat
from megatron_ext.parallel.world import World
from megatron_ext.train.supervision import Attempt, Failure, Limits, RankEnd, blame, lost_hosts, pause, rank_end, verdict

RANKS = {"a": 2, "b": 2}
KILLED = Failure("b", 3, "was killed by SIGKILL", struck=True)
BROKEN = Failure("a", 0, "ended with code 1")
RESET = "RuntimeError: Connection closed by peer"


def heartbeat_line(rank: int, what: str) -> str:
    """What the heartbeat of rank 0 says, in its own words."""
    heartbeat = Heartbeat.__new__(Heartbeat)
    heartbeat._world, heartbeat._hosts = World(0, 4, torch.device("cpu")), ["node-a", "node-a", "node-b", "node-b"]
    return heartbeat._describe({"rank": rank, "what": what})


def test_the_line_of_a_guard_is_read_and_others_are_not() -> None:
    assert rank_end('noise rank ended: {"rank": 3, "host": "x", "code": -9}', "b") == RankEnd(3, "b", -9)
    for line in ("rank 3 ended", "rank ended: {oops}", 'rank ended: {"rank": 3}', 'rank ended: {"rank": "3", "code": 1}'):
        assert rank_end(line, "b") is None


def test_a_killed_rank_is_blamed_and_not_those_that_fell_over_it() -> None:
    ends = [RankEnd(1, "a", 1), RankEnd(3, "b", -9), RankEnd(0, "a", 1)]
    assert blame(ends, [RESET], [], RANKS) == KILLED
    assert blame(ends[:1], [RESET], [], RANKS) == Failure("a", 1, f"ended with code 1: {RESET}")


def test_a_signal_without_a_name_is_told_by_its_number() -> None:
    assert blame([RankEnd(0, "a", -35)], [], [], RANKS).reason == "was killed by signal 35"


def test_a_silent_rank_is_blamed_with_its_host_as_the_supervisor_calls_it() -> None:
    for what in (
        "has not been heard for 6 s (train.heartbeat_timeout is 5 s): step 3, forward",
        "cannot be reached (DistNetworkError)",
        "has not moved for 30 s in step 3 (train.hang_timeout; the limit is 30 s)",
    ):
        failure = blame([RankEnd(0, "a", 1), RankEnd(1, "a", 1)], ["noise", heartbeat_line(2, what)], [], RANKS)
        assert failure == Failure("b", 2, what, struck=True)
    raised = heartbeat_line(2, "failed with RuntimeError: x; its own traceback says more")
    assert blame([RankEnd(2, "b", 1)], [raised], [], RANKS).rank == 2 and not blame([RankEnd(2, "b", 1)], [raised], [], RANKS).struck


def test_a_host_that_does_not_answer_is_blamed_before_its_ranks() -> None:
    assert blame([RankEnd(0, "a", 1)], [], ["b"], RANKS) == Failure("b", None, "b cannot be reached")


def test_wrong_configuration_is_final_and_a_full_disk_is_not() -> None:
    end = [RankEnd(0, "a", 2)]
    assert blame(end, ["ConfigError: train.steps: -1"], [], RANKS).final
    assert blame(end, ["DataError: x"], [], RANKS).final
    assert not blame(end, ["CheckpointError: cannot save the checkpoint: No space left on device"], [], RANKS).final
    assert not blame(end, ["ConfigError: run_dir: x is used by process 3 on host b since now; accepted: ..."], [], RANKS).final
    assert not blame([RankEnd(0, "a", 1)], ["ConfigError: of a library"], [], RANKS).final
    assert verdict([Attempt(0, 0, Failure("a", 0, "", final=True))], Limits()) == "it would fail so again"


def test_a_run_without_progress_stops_sooner_than_one_with_it() -> None:
    limits = Limits(restarts=10, window=1000, stuck=2)
    idle = [Attempt(0, 5, BROKEN)] + [Attempt(5, 5, BROKEN)] * 2
    assert verdict(idle, limits) is None
    assert "2 restarts in a row" in (verdict([*idle, Attempt(5, 5, BROKEN)], limits) or "")
    moving = [Attempt(5 * n, 5 * n + 5, BROKEN) for n in range(10)]
    assert verdict(moving, limits) is None
    assert "10 restarts within 1000 steps" in (verdict([*moving, Attempt(50, 55, BROKEN)], limits) or "")
    far = [Attempt(500 * n, 500 * n + 500, BROKEN) for n in range(50)]
    assert verdict(far, limits) is None, "old failures are forgotten as the run goes on"


def test_an_error_of_the_numbers_that_comes_again_in_the_same_words_is_final() -> None:
    def failed(text: str) -> Attempt:
        return Attempt(3, 6, blame([RankEnd(0, "a", 2)], [text], [], RANKS))

    for name in ("TrainingError", "NonFiniteError"):
        first, other = failed(f"{name}: skipped 2 steps in a row: step 9"), failed(f"{name}: skipped 2 steps in a row: step 12")
        assert verdict([first], Limits()) is None and verdict([first, other], Limits()) is None
        assert "it failed twice in the same words" in (verdict([other, first, first], Limits()) or "")
    storage = failed("StorageError: disk full")
    assert verdict([storage, storage], Limits()) is None


def test_pauses_grow_while_there_is_no_new_checkpoint() -> None:
    limits = Limits(pause=5)
    assert pause([Attempt(0, 5, BROKEN)], limits) == 0
    assert [pause([Attempt(0, 5, BROKEN), *[Attempt(5, 5, BROKEN)] * idle], limits) for idle in (1, 2, 3, 7, 5000)] == [5, 10, 20, 300, 300]
    assert pause([Attempt(0, 0, BROKEN)] * 3, Limits(pause=0)) == 0


def test_checkpoints_of_another_run_in_the_directory_are_no_progress() -> None:
    refused = Failure("a", 0, "ended with code 2: ConfigError: run_dir: x is used by process 3 on host b since now; accepted: ...")
    assert "1 restarts in a row" in (verdict([Attempt(0, 5, refused), Attempt(5, 9, refused)], Limits(stuck=1)) or "")


def test_no_restart_at_all_can_be_asked_for() -> None:
    assert verdict([Attempt(0, 5, BROKEN)], Limits(restarts=0)) is not None
    assert verdict([Attempt(0, 0, BROKEN)], Limits(stuck=0)) is not None


def test_a_host_whose_ranks_die_again_and_again_is_lost_but_never_the_last() -> None:
    limits = Limits(window=100, strikes=3)
    attempts = [Attempt(n, n + 1, KILLED) for n in range(3)]
    assert lost_hosts(attempts[:2], limits, ["a", "b"]) == []
    assert lost_hosts(attempts, limits, ["a", "b"]) == ["b"]
    assert lost_hosts(attempts, limits, ["b"]) == []
    assert lost_hosts([Attempt(n, n + 1, BROKEN) for n in range(9)], limits, ["a", "b"]) == [], "a defect is not the host's fault"
    assert lost_hosts([*attempts, Attempt(3, 200, BROKEN)], limits, ["a", "b"]) == [], "long ago"
