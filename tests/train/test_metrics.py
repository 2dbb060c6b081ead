import json
from collections import Counter
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.train.metrics import MetricsWriter, length_histogram


def steps(run_dir: Path) -> list[tuple[str, int]]:
    lines = (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()
    return [(record["kind"], record["step"]) for record in map(json.loads, lines)]


def write(run_dir: Path, resumed_at: int, *written: int, active: bool = True) -> None:
    writer = MetricsWriter(run_dir, resumed_at, active)
    writer.write("start", step=resumed_at)
    for step in written:
        writer.write("train", step=step, loss=0.5)
    writer.flush()


def test_records_are_lines_that_are_there_at_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0, active=True)
    writer.write("train", step=1, loss=0.1, names={"ü": 1})
    record = json.loads((tmp_path / "metrics.jsonl").read_text("utf-8"))
    assert record.pop("time") > 1e9 and record == {"kind": "train", "step": 1, "loss": 0.1, "names": {"ü": 1}}
    writer.flush()


def test_steps_that_are_computed_again_are_dropped(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, 2, 3, 4, 5)
    write(tmp_path, 3, 4, 5)
    assert steps(tmp_path) == [("start", 0), *[("train", s) for s in (1, 2, 3)], ("start", 3), ("train", 4), ("train", 5)]


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, 2, 3)
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "train", "st')
    write(tmp_path, 3, 4)
    assert steps(tmp_path) == [("start", 0), ("train", 1), ("train", 2), ("train", 3), ("start", 3), ("train", 4)]


def test_a_run_from_the_beginning_begins_the_file(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, 2)
    write(tmp_path, 0, 1)
    assert steps(tmp_path) == [("start", 0), ("train", 1)]


def test_other_ranks_write_nothing_and_drop_nothing(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, 2)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    write(tmp_path, 0, 1, active=False)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@given(st.lists(st.integers(1, 5000)))
def test_histogram_counts_by_powers_of_two(lengths: list[int]) -> None:
    histogram = length_histogram(lengths)
    keys = [int(key) for key in histogram]
    assert keys == sorted(keys) and sum(histogram.values()) == len(lengths)
    expected = Counter(next(key for key in (2**n for n in range(14)) if key / 2 < length <= key) for length in lengths)
    assert {int(key): count for key, count in histogram.items()} == expected
