"""When a supervisor waits, and for how long, without a moment of waiting."""

import errno
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.atomic_io import write_json
from megatron_ext.train.file_lock import Owner
from megatron_ext.train.launching import RemoteShell
from megatron_ext.train.supervision import Failure, Limits
from megatron_ext.train.supervisor import Clock, Supervised, Supervisor
from tests.train.tiny_run import write_run


@dataclass
class FakeTime:
    """A clock that goes on only while somebody sleeps."""

    now: float = 0.0
    during: Callable[[], None] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.during()

    def clock(self) -> Clock:
        return Clock(lambda: self.now, self.sleep)


@dataclass(frozen=True)
class Hosts(RemoteShell):
    """Hosts of which some do not answer, until a time."""

    time: FakeTime = field(default_factory=FakeTime)
    silent: tuple[str, ...] = ()
    until: float = float("inf")

    def unreachable(self, hosts: list[str], seconds: float = 20.0) -> list[str]:
        return [host for host in hosts if host in self.silent and self.time.now < self.until]


@pytest.fixture(autouse=True)
def signals_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(folder: Path, hosts: Hosts, limits: Limits, failures: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[dict[str, Any]]]:
    """Supervise on hosts a and b a run of two ranks that fails so often before it ends well; the code, and what was noted."""
    ends = iter([(1, Failure("a", 0, "ended with code 1"))] * failures + [(0, None)])
    monkeypatch.setattr(Supervisor, "_attempt", lambda self, layout, resume: next(ends))
    config = write_run(folder, parallel__tp=2)
    what = Supervised(str(config), (), {"a": 1, "b": 1}, script="", guard="", remote=hosts, limits=limits)
    code = Supervisor(what, hosts.time.clock()).run()
    return code, [json.loads(line) for line in (folder / "run" / "supervisor.jsonl").read_text("utf-8").splitlines()]


def test_hosts_are_waited_for_until_they_are_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts = Hosts(time=FakeTime(), silent=("a", "b"), until=12.0)
    code, events = run(tmp_path, hosts, Limits(pause=5), 0, monkeypatch)
    assert code == 0 and hosts.time.now == 15.0, "5 s and 10 s"
    assert [event["event"] for event in events] == [*["host_lost"] * 2, "wait", "wait", *["host_back"] * 2, "start", "end"]
    assert "no grid fits 0 ranks on 0 hosts: there is no host; waiting 5 s for a, b, 1800 s in all" in capsys.readouterr().out


def test_hosts_that_stay_away_are_given_up_after_the_time_that_was_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = Hosts(time=FakeTime(), silent=("a", "b"))
    code, events = run(tmp_path, hosts, Limits(pause=5, hosts=60), 0, monkeypatch)
    assert code == 1 and hosts.time.now == 60.0
    assert [event["seconds"] for event in events if event["event"] == "wait"] == [5, 10, 20, 25]
    assert events[-1]["event"] == "give_up" and "no grid fits 0 ranks on 0 hosts" in events[-1]["reason"]


def test_a_grid_that_fits_nowhere_is_waited_for_by_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = Hosts(time=FakeTime())
    monkeypatch.setattr("megatron_ext.train.supervisor.lost_hosts", lambda attempts, limits, names: names if attempts else [])
    code, events = run(tmp_path, hosts, Limits(pause=0), 1, monkeypatch)
    assert code == 1 and hosts.time.now == 0.0 and "wait" not in [event["event"] for event in events]


def test_sigterm_ends_the_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = Hosts(time=FakeTime(during=lambda: os.kill(os.getpid(), signal.SIGTERM)), silent=("a", "b"))
    code, events = run(tmp_path, hosts, Limits(pause=100), 0, monkeypatch)
    assert code == 1 and hosts.time.now < 1 and events[-1]["reason"] == "it was asked to stop"


def test_restarts_that_bring_nothing_wait_longer_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = Hosts(time=FakeTime())
    code, events = run(tmp_path, hosts, Limits(pause=5, stuck=3), 3, monkeypatch)
    assert code == 0 and hosts.time.now == 35.0
    assert [event["seconds"] for event in events if event["event"] == "pause"] == [5, 10, 20]


def test_an_outage_that_hides_the_lock_too_is_outlasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, read = tmp_path / "run" / "supervisor_lock.json", Path.read_bytes
    hosts = Hosts(time=FakeTime())

    def read_once_it_is_back(file: Path) -> bytes:
        if file == path and hosts.time.now < 10:
            raise OSError(errno.EIO, "Input/output error")
        return read(file)

    monkeypatch.setattr(Path, "read_bytes", read_once_it_is_back)
    code, events = run(tmp_path, hosts, Limits(pause=5, stuck=3), 3, monkeypatch)
    assert code == 0 and [event["event"] for event in events].count("restart") == 3
    assert capsys.readouterr().out.count(f"{path} cannot be read: Input/output error; it counts as still this supervisor's") == 1
    assert not path.exists()


def test_a_lock_of_another_supervisor_is_a_reason_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run" / "supervisor_lock.json"
    other = replace(Owner.me(), host="far")
    hosts = Hosts(time=FakeTime(during=lambda: write_json(path, asdict(other))))
    code, events = run(tmp_path, hosts, Limits(pause=5, stuck=3), 1, monkeypatch)
    assert code == 1 and events[-1]["event"] == "give_up"
    assert events[-1]["reason"] == f"{path} is no longer this supervisor's, but of {other}"


def test_sigterm_in_a_pause_is_no_reason_to_start_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = Hosts(time=FakeTime(during=lambda: os.kill(os.getpid(), signal.SIGTERM)))
    code, events = run(tmp_path, hosts, Limits(), 1, monkeypatch)
    assert code == 1 and [event["event"] for event in events] == ["start", "failure", "pause", "give_up"]
