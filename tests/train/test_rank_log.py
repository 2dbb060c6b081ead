import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.errors import StorageError
from megatron_ext.parallel.world import World
from megatron_ext.train.metrics import MetricsWriter
from megatron_ext.train.rank_log import RankLog, log_path
from megatron_ext.train.record_file import RecordFile


def lines(run_dir: Path, rank: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log_path(run_dir, rank).read_text("utf-8").splitlines()]


def rank(number: int) -> World:
    return World(number, 4, torch.device("cpu"))


def test_a_line_says_who_where_when_and_what(tmp_path: Path) -> None:
    world = rank(3)
    with RankLog(tmp_path, world):
        world.activity.begin("data", step=7)
        logging.getLogger("megatron_ext.somewhere").info("read %d ü", 5, extra={"details": {"file": Path("a")}})
        (line,) = lines(tmp_path, 3)
    assert (tmp_path / "logs" / "rank_00003.jsonl").exists()
    assert line.pop("time") > 1e9 and line.pop("host")
    assert line == {
        "level": "INFO",
        "rank": 3,
        "step": 7,
        "logger": "megatron_ext.somewhere",
        "message": "read 5 ü",
        "details": {"file": "a"},
    }


def test_errors_come_with_their_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RankLog(tmp_path, rank(0)):
        _ = 1 / 0
    (line,) = lines(tmp_path, 0)
    assert line["level"] == "ERROR" and line["message"] == "ZeroDivisionError: division by zero"
    assert line["exception"].startswith("Traceback") and "_ = 1 / 0" in line["exception"]


def test_warnings_are_logged_and_still_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RankLog(tmp_path, rank(1)):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            logging.captureWarnings(False)  # pytest has put its own in the place of what shows warnings
            logging.captureWarnings(True)
            warnings.warn("old way", DeprecationWarning, stacklevel=1)
            logging.captureWarnings(False)
        logging.getLogger("library").warning("careful")
        logging.getLogger("library").info("chatter")
        logging.getLogger("megatron_ext.x").error("ours is printed by whoever raises it")
    told = [(line["logger"], line["level"]) for line in lines(tmp_path, 1)]
    assert told == [("py.warnings", "WARNING"), ("library", "WARNING"), ("megatron_ext.x", "ERROR")]
    errors = capsys.readouterr().err
    assert "old way" in errors and "careful" in errors and "chatter" not in errors and "ours" not in errors


def test_a_line_that_was_cut_off_makes_room_for_the_next(tmp_path: Path) -> None:
    log_path(tmp_path, 0).parent.mkdir()
    log_path(tmp_path, 0).write_text('{"time": 1', "utf-8")
    with RankLog(tmp_path, rank(0)):
        logging.getLogger("megatron_ext.x").info("next")
    assert [line["message"] for line in lines(tmp_path, 0)] == ["next"]


def test_what_could_not_be_logged_is_told_and_hides_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log_path(tmp_path, 0).mkdir(parents=True)
    with pytest.raises(ZeroDivisionError), RankLog(tmp_path, rank(0)):
        _ = 1 / 0
    told = f"{log_path(tmp_path, 0)} cannot be written: Is a directory; records that wait in memory: 1"
    assert capsys.readouterr().err == f"{told}. They are tried again\n{told}, and they are lost\n"


def test_what_cannot_be_logged_does_not_end_what_logs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: RecordFile, line: str) -> None:
        raise StorageError("more waits than there is memory for")

    monkeypatch.setattr(RecordFile, "write_line", broken)
    with RankLog(tmp_path, rank(0)):
        logging.getLogger("megatron_ext.x").error("the run goes on")


def test_events_are_in_the_logs_of_all_ranks_and_later_runs_append(tmp_path: Path) -> None:
    before = list(logging.getLogger().handlers)
    for number in (0, 1, 1):
        with RankLog(tmp_path, rank(number)):
            writer = MetricsWriter(tmp_path, 0, active=number == 0)
            writer.write("event", event="skip", step=4)
            writer.flush()
    assert [line["message"] for line in lines(tmp_path, 1)] == ["event skip"] * 2
    assert lines(tmp_path, 0)[0]["details"] == {"event": "skip", "step": 4}
    assert logging.getLogger().handlers == before
