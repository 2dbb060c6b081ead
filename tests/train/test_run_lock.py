"""Two runs on one directory: refused while the first lives, wherever it lives, and only then."""

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_ext.atomic_io import write_json
from megatron_ext.errors import CheckpointError, ConfigError
from megatron_ext.parallel.world import World
from megatron_ext.train.file_lock import Owner
from megatron_ext.train.run_lock import LOCK_FILE, RunLock
from tests.distributed import RunRanks
from tests.grids import ALONE

FAR = replace(Owner.me(), host="far", machine="another kernel", pid=1)
"""A process of which nothing can be seen from here."""


def fork(action: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    return pid


def hold(run_dir: Path) -> int:
    """A process that holds the lock until it is killed; returns its number when it has the lock."""

    def forever() -> None:
        with RunLock(run_dir, ALONE):
            time.sleep(600)

    pid = fork(forever)
    while not (run_dir / LOCK_FILE).exists():
        time.sleep(0.01)
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_second_run_is_refused_until_the_first_was_killed(tmp_path: Path) -> None:
    pid = hold(tmp_path)
    with pytest.raises(ConfigError, match=f"run_dir: {tmp_path} is used by process {pid} on host .* since 2.*; accepted: ") as caught:
        RunLock(tmp_path, ALONE).__enter__()
    assert "tools/stop.py" in str(caught.value)
    kill(pid)
    before = time.monotonic()
    with RunLock(tmp_path, ALONE) as lock:
        lock.confirm()
        assert time.monotonic() - before < 5, "no waiting for what the kernel knows"
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_the_end_of_a_run_frees_the_directory_also_by_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), RunLock(tmp_path, ALONE):
            raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["read_bytes", "unlink"])
def test_a_file_system_that_is_away_at_the_end_of_a_run_does_not_make_it_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    def fail(path: Path, **options: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch, RunLock(tmp_path, ALONE):
        patch.setattr(Path, method, fail)
    assert f"{tmp_path / LOCK_FILE} cannot be removed: Stale file handle; who comes next takes it over" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    with pytest.raises(KeyError), monkeypatch.context() as patch, RunLock(tmp_path / "other", ALONE):
        patch.setattr(Path, method, fail)
        raise KeyError


def test_a_process_that_was_given_the_number_of_a_dead_one_is_not_taken_for_it(tmp_path: Path) -> None:
    write_json(tmp_path / LOCK_FILE, asdict(replace(Owner.me(), started="1")))
    with RunLock(tmp_path, ALONE) as lock:
        lock.confirm()


def test_a_run_of_another_host_that_gives_signs_of_life_is_left_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / LOCK_FILE
    write_json(path, asdict(FAR))

    def touch() -> None:
        for _ in range(100):
            time.sleep(0.1)
            os.utime(path)

    pid = fork(touch)
    with pytest.raises(ConfigError, match="is used by process 1 on host far"):
        RunLock(tmp_path, ALONE, silent_seconds=10).__enter__()
    kill(pid)
    assert "watching for 10 s whether that lives" in capfd.readouterr().out


def test_a_silent_run_of_another_host_is_taken_over_and_finds_out(tmp_path: Path) -> None:
    with RunLock(tmp_path, ALONE) as sleeper:
        mine = json.loads((tmp_path / LOCK_FILE).read_text())
        write_json(tmp_path / LOCK_FILE, {**mine, "machine": "another kernel"})
        sleeper._lock._owner = replace(sleeper._lock._owner, machine="another kernel")
        sleeper.confirm()
        with RunLock(tmp_path, ALONE, silent_seconds=0.5) as taker:
            taker.confirm()
            with pytest.raises(CheckpointError, match=f"no longer this run's, but of process {os.getpid()} on host "):
                sleeper.confirm()
            sleeper.__exit__(None, None, None)
            taker.confirm()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_waits_in_a_long_call_still_gives_signs_of_life(tmp_path: Path) -> None:
    with RunLock(tmp_path, ALONE, touch_seconds=0.05):
        before = (tmp_path / LOCK_FILE).stat().st_mtime_ns
        time.sleep(0.5)
        assert (tmp_path / LOCK_FILE).stat().st_mtime_ns > before


def test_of_many_that_find_a_dead_run_only_one_at_a_time_takes_over(tmp_path: Path) -> None:
    kill(hold(tmp_path))
    inside = tmp_path / "inside"

    def contend(number: int) -> None:
        try:
            with RunLock(tmp_path, ALONE) as lock:
                inside.touch(exist_ok=False)
                time.sleep(0.5)
                lock.confirm()
                inside.unlink()
                (tmp_path / f"won{number}").touch()
        except ConfigError as error:
            (tmp_path / f"lost{number}").write_text(str(error))

    pids = [fork(lambda number=number: contend(number)) for number in range(6)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 6
    assert list(tmp_path.glob("won*")) and len([*tmp_path.glob("won*"), *tmp_path.glob("lost*")]) == 6
    assert all("is used by process" in path.read_text() for path in tmp_path.glob("lost*"))
    assert not list(tmp_path.glob("*lock*"))


NO_LOCKS = ["", "{}", "[1]", '{"pid": 3}', *(json.dumps({**asdict(FAR), **change}) for change in ({"pid": -1}, {"host": "\x1b[2J"}))]


@pytest.mark.parametrize("text", NO_LOCKS)
def test_a_file_that_is_no_lock_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK_FILE).write_text(text)
    with pytest.raises(ConfigError, match="lock.json is no lock of a run; remove it if no run uses the directory"):
        RunLock(tmp_path, ALONE).__enter__()


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / LOCK_FILE
    for make in (path.mkdir, lambda: path.symlink_to(tmp_path / "nowhere")):
        make()
        with pytest.raises(ConfigError, match="lock.json is .*no lock of a run; remove it"):
            RunLock(tmp_path, ALONE).__enter__()
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_directory_that_cannot_be_locked_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*names: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", fail)
        with pytest.raises(ConfigError, match=f"run_dir: {tmp_path} is on .* without hard links .*: Operation not .*; accepted: a direct"):
            RunLock(tmp_path, ALONE).__enter__()
    monkeypatch.setattr("megatron_ext.train.file_lock.write_json", fail)
    with pytest.raises(ConfigError, match=f"run_dir: {tmp_path} cannot be locked by lock.json: Operation not permitted; accepted: "):
        RunLock(tmp_path, ALONE).__enter__()
    assert list(tmp_path.iterdir()) == []


def enter(world: World, run_dir: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        RunLock(run_dir, world).__enter__()
    return str(caught.value)


def test_all_ranks_are_refused(run_ranks: RunRanks, tmp_path: Path) -> None:
    with RunLock(tmp_path, ALONE):
        messages = run_ranks(2, enter, tmp_path)
    assert len(set(messages)) == 1 and f"is used by process {os.getpid()} " in messages[0]
