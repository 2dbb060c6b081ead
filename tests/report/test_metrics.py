import math
from pathlib import Path

import pytest

from megatron_ext.errors import DataError
from megatron_ext.report.metrics import read_run
from tests.report.fake_runs import TOKENS_PER_STEP, UNIGRAM_ENTROPY, evaluation, start, train, write_run


def test_reads_every_kind_of_record(tmp_path: Path) -> None:
    checkpoint = {"kind": "event", "event": "save", "time": 1.7e9, "step": 2}
    records = [start(), evaluation(0, "prose", 9.0), train(1, 8.0), train(2, 7.0), evaluation(2, "code", 6.5), checkpoint]
    run = read_run(write_run(tmp_path / "run", records, config={"run": "pretrain"}))
    assert run.name == "pretrain"
    assert run.config == {"run": "pretrain"}
    assert run.tokens == 2 * TOKENS_PER_STEP
    assert run.sources == ["prose", "code"]
    assert run.tokens_by_source == {"prose": 2 * TOKENS_PER_STEP}
    assert run.unigram_entropy == UNIGRAM_ENTROPY
    assert run.epochs == {"prose": 0.02}
    assert run.length_histogram == {64: 6, 128: 20, 256: 4}
    assert run.column("loss").tolist() == [8.0, 7.0]
    assert [(record.step, record.source, record.loss) for record in run.evals] == [(0, "prose", 9.0), (2, "code", 6.5)]
    assert [(event.step, event.event) for event in run.events] == [(2, "save")]
    assert not run.torn


@pytest.mark.parametrize("torn", ['{"kind":"train","st', '{"kind":"eval","source":"pr\u00e9'])
def test_a_torn_last_line_is_left_out_and_noted(tmp_path: Path, torn: str) -> None:
    directory = write_run(tmp_path / "run", [start(), train(1)], torn=torn)
    content = (directory / "metrics.jsonl").read_bytes()
    (directory / "metrics.jsonl").write_bytes(content[:-1])  # in the second case half a character is left
    run = read_run(directory)
    assert [record.step for record in run.train] == [1]
    assert run.torn


def test_a_whole_last_line_without_newline_counts(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", [start(), train(1), train(2)])
    path = directory / "metrics.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    run = read_run(directory)
    assert [record.step for record in run.train] == [1, 2]
    assert not run.torn


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"kind":"train","st', "Unterminated string"),
        ("", "Expecting value"),
        ("[1, 2]", "expected a JSON object, found list"),
        ('{"step": 3}', "kind is None, accepted are start, train, eval, needle, event"),
        ('{"kind": "trian"}', "kind is 'trian'"),
        ('{"kind": ["train"]}', "accepted are start"),
        ('{"kind": "train", "time": 0, "tokens": 1, "loss": 1}', "train record without 'step'"),
        ('{"kind": "train", "time": 0, "step": true, "tokens": 1, "loss": 1}', "step is True, expected int"),
        ('{"kind": "train", "time": 0, "step": 1, "tokens": 1, "loss": "low"}', "loss is 'low', expected float"),
        ('{"kind": "train", "time": 0, "step": 1, "tokens": 1, "loss": 1, "epochs": {"prose": "x"}}', "epochs.prose is 'x'"),
        ('{"kind": "train", "time": 0, "step": 1, "tokens": 1, "loss": 1, "length_histogram": {"100": 1}}', "not a power of two"),
        ('{"kind": "eval", "time": 0, "step": 1, "tokens": 1, "loss": 1}', "eval record without 'source'"),
    ],
)
def test_a_line_that_is_no_record_is_refused_with_file_and_line(tmp_path: Path, line: str, reason: str) -> None:
    directory = write_run(tmp_path / "run", [start(), train(1), line, train(2)])
    with pytest.raises(DataError) as caught:
        read_run(directory)
    assert str(caught.value).startswith(f"{directory / 'metrics.jsonl'}:3: ")
    assert reason in str(caught.value)


def test_invalid_utf8_is_refused_with_file_and_line(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", [start(), train(1)])
    with open(directory / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "\xff"}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:3: "):
        read_run(directory)


@pytest.mark.parametrize("records", [[], [train(1)], [train(1), start()]])
def test_the_first_record_must_be_a_start(tmp_path: Path, records: list[dict[str, object]]) -> None:
    directory = write_run(tmp_path / "run", records)
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: the first record must be of kind 'start'"):
        read_run(directory)


def test_missing_directory_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent: no such run directory"):
        read_run(tmp_path / "absent")
    directory = write_run(tmp_path / "run", [start()])
    (directory / "config.yaml").rename(directory / "elsewhere")
    with pytest.raises(DataError, match=r"config\.yaml: no such file"):
        read_run(directory)
    (directory / "elsewhere").rename(directory / "config.yaml")
    (directory / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match=r"metrics\.jsonl: no such file"):
        read_run(directory)


@pytest.mark.parametrize("text", ["a: [1", "- a\n- b\n", "!!python/object/apply:os.getcwd []", "[" * 20_000])
def test_a_config_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    directory = write_run(tmp_path / "run", [start()])
    (directory / "config.yaml").write_text(text, "utf-8")
    with pytest.raises(DataError, match=r"config\.yaml: "):
        read_run(directory)


def test_after_a_resume_the_last_record_of_a_step_counts(tmp_path: Path) -> None:
    first = [start(), train(1, 9.0), train(2, 8.0), evaluation(2, "prose", 8.5), train(3, 7.0), train(4, 6.0), evaluation(4, "prose", 6.5)]
    skip = {"kind": "event", "event": "skip", "step": 4}
    resumed = [start(step=2), evaluation(2, "prose", 8.4), train(3, 7.5)]
    run = read_run(write_run(tmp_path / "run", [*first, skip, *resumed]))
    assert [(record.step, record.loss) for record in run.train] == [(1, 9.0), (2, 8.0), (3, 7.5)]
    assert [(record.step, record.loss) for record in run.evals] == [(2, 8.4)]
    assert run.skipped == []
    assert run.tokens == 3 * TOKENS_PER_STEP
    # without the resume nothing is replaced
    assert read_run(write_run(tmp_path / "unbroken", [*first, skip])).tokens == 4 * TOKENS_PER_STEP


def test_time_between_a_stop_and_a_resume_does_not_count(tmp_path: Path) -> None:
    records = [start(time=100), train(1, time=110), start(time=5000, step=1), train(2, time=5007)]
    assert read_run(write_run(tmp_path / "run", records)).seconds == 17


def test_skipped_steps_come_from_events_and_from_the_counter(tmp_path: Path) -> None:
    counted = [train(1), train(2, skipped_steps=1), train(3, skipped_steps=1), train(4, skipped_steps=2)]
    event = {"kind": "event", "event": "skip", "step": 3}
    assert read_run(write_run(tmp_path / "counter", [start(), *counted])).skipped == [2, 4]
    assert read_run(write_run(tmp_path / "both", [start(), *counted, event])).skipped == [2, 3, 4]


def test_null_and_nan_stand_for_numbers_that_were_not_measured(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", [start(), train(1, tflops=None, grad_norm=math.nan)]))
    assert math.isnan(run.train[0].tflops)
    assert math.isnan(run.train[0].grad_norm)


def test_keys_of_later_versions_are_left_alone(tmp_path: Path) -> None:
    assert read_run(write_run(tmp_path / "run", [start(), train(1, loss=4.5, temperature=3)])).train[0].loss == 4.5


def test_tokens_by_source_are_those_of_the_last_step_that_names_them(tmp_path: Path) -> None:
    steps = [
        train(1, tokens_by_source={"prose": 10}),
        train(2, tokens_by_source={"prose": 15, "code": 4}),
        train(3, tokens_by_source={"code": 9}),
    ]
    assert read_run(write_run(tmp_path / "run", [start(), *steps])).tokens_by_source == {"prose": 15, "code": 9}
