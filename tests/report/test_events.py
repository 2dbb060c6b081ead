from pathlib import Path

import pytest

from megatron_ext.errors import DataError
from megatron_ext.report.events import latest_events, read_events
from megatron_ext.report.metrics import read_run
from tests.report.fake_runs import start, train, write_run

SKIP = '{"kind": "event", "event": "skip", "step": 2, "time": 1.0}\n'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"kind": "train", "time": 0, "step": 1, "tokens": 1, "loss": 1}', "events.jsonl:2: not an event"),
        ("{", "events.jsonl:2: not a record"),
        ('{"kind": "event", "step": 1}', "events.jsonl:2: not a record of metrics: event record without 'event'"),
        ('{"kind": "event", "event": "skip", "step": "1"}', "events.jsonl:2: not a record of metrics: step is '1', expected int"),
    ],
)
def test_what_is_no_event_is_refused_with_file_and_line(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "events.jsonl").write_text(f"{SKIP}{line}\n{SKIP}")
    with pytest.raises(DataError) as caught:
        read_events(tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and reason in str(caught.value)


def test_events_of_old_runs_are_in_their_metrics(tmp_path: Path) -> None:
    saved = {"kind": "event", "event": "checkpoint", "time": 1.7e9, "step": 2, "path": "somewhere"}
    directory = write_run(tmp_path / "run", [start(), train(1), train(2), saved])
    for events in (read_run(directory).events, latest_events(directory)):
        assert [(event.event, event.step, event.details) for event in events] == [("save", 2, {"path": "somewhere"})]
    assert read_events(directory) == []
    # It goes on with a version that writes them apart.
    (directory / "events.jsonl").write_text('{"kind": "event", "event": "start", "step": 2}\n' + SKIP.replace("2", "4"))
    assert [event.event for event in read_run(directory).events] == ["save", "start", "skip"]
    assert [event.event for event in latest_events(directory)] == ["save", "start", "skip"]


def test_skips_of_steps_that_were_computed_again_do_not_count(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", [start(), train(1), train(2)])
    (directory / "events.jsonl").write_text(SKIP)
    assert read_run(directory).skipped == [2]
    with open(directory / "events.jsonl", "a") as file:
        file.write('{"kind": "event", "event": "restart", "step": 1}\n')
    run = read_run(directory)
    assert run.skipped == [] and [event.event for event in run.events] == ["skip", "restart"]
