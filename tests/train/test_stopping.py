import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ext.train.stopping import StopRequest, forget_request, request_stop
from tests.distributed import RunRanks
from tests.train.tiny_run import losses, records, train, write_run


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Put back what the test runner does with signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_repeats_are_ignored(tmp_path: Path, number: signal.Signals) -> None:
    stop = StopRequest(tmp_path)
    assert stop.reason is None
    for each in (number, signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), each)
    assert stop.reason == number.name


def test_a_file_asks_until_it_is_forgotten(tmp_path: Path) -> None:
    stop = StopRequest(tmp_path)
    path = request_stop(tmp_path)
    assert stop.reason == f"the file {path}"
    forget_request(tmp_path)
    forget_request(tmp_path)
    assert stop.reason is None and not path.exists()


def test_a_run_that_is_not_there_cannot_be_asked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        request_stop(tmp_path / "nowhere")


def test_one_rank_asked_stops_all_after_the_same_step(run_ranks: RunRanks, tmp_path: Path) -> None:
    """The file is there from the start: the run does one step, saves it and ends, and goes on from there the next time."""
    config = write_run(tmp_path, checkpoint__every=100)
    (tmp_path / "run").mkdir()
    request_stop(tmp_path / "run")
    run_ranks(2, train, config)
    assert list(losses(tmp_path / "run")) == [1]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_00000001"]
    assert [record["event"] for record in records(tmp_path / "run", "event")] == ["start", "save", "stop"]
    run_ranks(2, train, config)
    assert list(losses(tmp_path / "run")) == [1, 2]
