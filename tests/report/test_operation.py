from pathlib import Path

from megatron_ext.report.metrics import read_run
from megatron_ext.report.operation import SlowRank, operation, slow_ranks
from megatron_ext.report.summary import arrange
from tests.report.fake_runs import start, train, write_run


def test_slow_ranks_are_counted_by_the_measure_of_the_run(tmp_path: Path) -> None:
    ratios = [1.2, 1.7, 2.5, 1.6, 1.1]
    records = [start(), *(train(step, slowest_rank=step % 2, slowest_ratio=ratio) for step, ratio in enumerate(ratios, 1))]
    told = {"kind": "event", "event": "straggler", "step": 4, "time": 1.7e9, "rank": 0}
    run = read_run(write_run(tmp_path / "a", [*records, told]))
    assert slow_ranks(run) == [SlowRank(0, 2, 1.7, 1), SlowRank(1, 1, 2.5, 0)]
    strict = read_run(write_run(tmp_path / "b", records, config={"logging": {"straggler_ratio": 2.0}}))
    assert slow_ranks(strict) == [SlowRank(1, 1, 2.5, 0)]
    assert slow_ranks(read_run(write_run(tmp_path / "c", [start(), train(1)]))) == []


def test_events_are_shown_without_saves_and_without_becoming_markup(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", [start(), train(1)])
    lines = [
        '{"kind": "event", "event": "save", "step": 1, "time": 1.7e9, "path": "kept quiet"}',
        '{"kind": "event", "event": "failure", "step": 1, "time": 1.7e9, "rank": 3, "what": "<b>oh</b>"}',
    ]
    (directory / "events.jsonl").write_text("\n".join(lines) + "\n")
    page = " ".join(map(str, operation(arrange([read_run(directory)]))))
    assert "failure" in page and "rank 3" in page and "&lt;b&gt;oh" in page and "<b>oh" not in page and "kept quiet" not in page
    quiet = write_run(tmp_path / "quiet", [start(), train(1)])
    assert operation(arrange([read_run(quiet)])) == []
