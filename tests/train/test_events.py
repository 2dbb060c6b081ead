import errno
import fcntl
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_ext.report.events import read_events, standing
from megatron_ext.report.metrics import read_run
from megatron_ext.train.events import append_event, start_event
from megatron_ext.train.metrics import MetricsWriter
from tests.distributed import RunRanks
from tests.train.tiny_run import train, write_run


def names(run_dir: Path) -> list[tuple[str, int]]:
    return [(event.event, event.step) for event in read_events(run_dir)]


def test_events_are_lines_that_are_there_at_once(tmp_path: Path) -> None:
    append_event(tmp_path, "skip", step=3, documents=["ü"])
    record = json.loads((tmp_path / "events.jsonl").read_text("utf-8"))
    assert record.pop("time") > 1e9 and record == {"kind": "event", "event": "skip", "step": 3, "documents": ["ü"]}
    (event,) = read_events(tmp_path)
    assert event.details == {"documents": ["ü"]}


def test_a_line_that_was_cut_off_makes_room_for_the_next(tmp_path: Path) -> None:
    append_event(tmp_path, "save", step=1)
    whole = (tmp_path / "events.jsonl").read_bytes()
    (tmp_path / "events.jsonl").write_bytes(whole + b'{"kind": "event", "ev')
    assert names(tmp_path) == [("save", 1)]
    append_event(tmp_path, "stop", step=1)
    assert names(tmp_path) == [("save", 1), ("stop", 1)]
    (tmp_path / "events.jsonl").write_bytes(b'{"kind": "ev')
    append_event(tmp_path, "start", step=0)
    assert names(tmp_path) == [("start", 0)]


def test_several_writers_do_not_mix_their_lines(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda step: append_event(tmp_path, "skip", step=step, filler="x" * 5000), range(80)))
    assert sorted(step for _, step in names(tmp_path)) == list(range(80))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_gets_its_events_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(number, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    append_event(tmp_path, "save", step=1)
    append_event(tmp_path, "stop", step=2)
    assert names(tmp_path) == [("save", 1), ("stop", 2)]


def test_the_writer_of_metrics_sends_events_there_and_drops_none(tmp_path: Path) -> None:
    for resumed_at in (0, 2, 0):
        writer = MetricsWriter(tmp_path, resumed_at, active=True)
        writer.write("start", step=resumed_at)
        writer.write("event", event="save", step=5)
        writer.flush()
    assert names(tmp_path) == [("save", 5)] * 3
    assert "event" not in (tmp_path / "metrics.jsonl").read_text("utf-8")
    MetricsWriter(tmp_path, 0, active=False).write("event", event="stop", step=1)
    assert names(tmp_path) == [("save", 5)] * 3


def test_starts_are_counted(tmp_path: Path) -> None:
    first = start_event(tmp_path)
    append_event(tmp_path, **first, step=0)
    append_event(tmp_path, "save", step=4)
    second = start_event(tmp_path)
    assert (first["event"], first["number"], second["event"], second["number"]) == ("start", 1, "restart", 2)


def test_a_run_tells_its_starts_saves_and_end(run_ranks: RunRanks, tmp_path: Path) -> None:
    """Stopped after its first checkpoint by an error, then to the end: what the first attempt did is told, but does not stand."""
    config = write_run(tmp_path, train__steps=4, checkpoint__every=2)
    run_ranks(2, train, config, ["train.steps=2"])
    append_event(tmp_path / "run", "skip", step=3)
    run_ranks(1, train, config)
    told = [
        ("start", 0),
        ("save", 2),
        ("finish", 2),
        ("skip", 3),
        ("restart", 2),
        ("resume", 2),
        ("override", 2),
        ("save", 4),
        ("finish", 4),
    ]
    assert names(tmp_path / "run") == told
    events = read_events(tmp_path / "run")
    assert events[4].details["number"] == 2 and events[4].details["ranks"] == 1 and events[4].details["total_steps"] == 4
    assert events[5].details["path"].endswith("step_00000002")
    assert [(event.event, event.step) for event in standing(events)] == [each for each in told if each != ("skip", 3)]
    (tmp_path / "run" / "config.yaml").write_text("{}")
    run = read_run(tmp_path / "run")
    assert run.events == events and run.skipped == []


def test_a_run_from_nothing_in_the_directory_of_another_says_what_it_overwrites(run_ranks: RunRanks, tmp_path: Path) -> None:
    config = write_run(tmp_path, train__steps=2, logging__ledger=True, evaluation__tokens=64)
    run_ranks(1, train, config)
    assert "overwrite" not in dict(names(tmp_path / "run"))
    run_ranks(1, train, config, ["checkpoint.resume=never"])
    (event,) = (event for event in read_events(tmp_path / "run") if event.event == "overwrite")
    assert event.step == 0 and event.details["files"] == ["metrics.jsonl", "ledger"]
