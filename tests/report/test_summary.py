from pathlib import Path

import pytest

from megatron_ext.errors import DataError
from megatron_ext.report.metrics import read_run
from megatron_ext.report.summary import SourceResult, arrange, headline, results
from tests.report.fake_runs import TOKENS_PER_STEP, evaluation, start, three_runs, train, write_run


def _by_key(rows: list[SourceResult]) -> dict[tuple[str, str], SourceResult]:
    return {(row.phase.label, row.name): row for row in rows}


def _code_step(step: int) -> dict[str, object]:
    return train(step, loss_by_source={"code": 4.0}, tokens_by_source={"code": 100 * step}, epochs={"code": 0.1 * step})


def _both(step: int, prose: float, code: float) -> list[dict[str, object]]:
    return [evaluation(step, "prose", prose), evaluation(step, "code", code)]


def _two_phases(directory: Path) -> list[Path]:
    before = [start(), *_both(0, 8.0, 9.0), train(1), train(2), *_both(2, 4.0, 5.0)]
    after = [start("continual"), *_both(0, 4.0, 5.0), *map(_code_step, (1, 2, 3)), *_both(3, 4.1, 3.0)]
    return [write_run(directory / "a", before), write_run(directory / "b", after)]


def test_final_table_has_the_numbers_of_the_records(tmp_path: Path) -> None:
    phases = arrange([read_run(path) for path in _two_phases(tmp_path)])
    rows = _by_key(results(phases))
    assert set(rows) == {("pretrain", "prose"), ("pretrain", "code"), ("continual", "prose"), ("continual", "code")}
    prose, code = rows["continual", "prose"], rows["continual", "code"]
    assert (prose.first_loss, prose.last_loss, prose.tokens, prose.epochs) == (4.0, 4.1, 0, None)
    assert prose.change == pytest.approx(2.5)
    assert (code.first_loss, code.last_loss, code.tokens, code.epochs) == (5.0, 3.0, 300, pytest.approx(0.3))
    assert code.change == pytest.approx(-40)
    assert rows["pretrain", "prose"].tokens == 2 * TOKENS_PER_STEP
    assert rows["pretrain", "code"].unigram_entropy == 5.63


def test_only_what_an_earlier_phase_trained_on_can_be_forgotten(tmp_path: Path) -> None:
    paths = _two_phases(tmp_path)
    rows = _by_key(results(arrange([read_run(path) for path in paths])))
    assert [key for key, row in rows.items() if row.is_earlier] == [("continual", "prose")]
    alone = results(arrange([read_run(paths[1])]))
    assert not any(row.is_earlier for row in alone)


def test_phases_follow_each_other_and_a_control_begins_with_the_last(tmp_path: Path) -> None:
    first, second = (read_run(path) for path in _two_phases(tmp_path))
    phases = arrange([first, second], {"control": second})
    assert [(phase.label, phase.offset, phase.end, phase.is_control) for phase in phases] == [
        ("pretrain", 0, 2 * TOKENS_PER_STEP, False),
        ("continual", 2 * TOKENS_PER_STEP, 5 * TOKENS_PER_STEP, False),
        ("control", 2 * TOKENS_PER_STEP, 5 * TOKENS_PER_STEP, True),
    ]
    assert [phase.label for phase in arrange([first, first])] == ["pretrain 1", "pretrain 2"]
    with pytest.raises(DataError, match="at least one run"):
        arrange([])


def test_headline_says_what_was_learned_and_what_was_forgotten(tmp_path: Path) -> None:
    runs = {name: read_run(path) for name, path in three_runs(tmp_path).items()}
    text = headline(arrange([runs["pretrain"], runs["continual"]], {"without replay": runs["no_replay"]}))
    assert text == (
        "In continual, code loss fell 36.1 %, from 5.35 to 3.42; prose loss, learned before, rose 1.8 %, from 4.25 to 4.33. "
        "For comparison, without replay: prose loss, learned before, rose 20.9 %, from 4.25 to 5.14."
    )
    assert "For comparison" not in headline(arrange([runs["pretrain"], runs["continual"]]))


def test_headline_of_one_phase_and_of_many_sources(tmp_path: Path) -> None:
    losses = [evaluation(step, f"source{i}", 9.0 - step) for step in (0, 1) for i in range(5)]
    text = headline(arrange([read_run(write_run(tmp_path / "run", [start(), train(1), *losses]))]))
    assert text.startswith("In pretrain, source0 loss fell 11.1 %, from 9.00 to 8.00; ")
    assert text.endswith("; 2 more in the table.")


@pytest.mark.parametrize(
    ("records", "text"),
    [
        ([], "pretrain has not finished a step."),
        ([train(1, 7.25)], "pretrain trained on 8.19 k tokens in one step, with a training loss of 7.250"),
        ([train(1, 7.25), train(2, 6.5)], "the training loss went from 7.250 to 6.500."),
        ([evaluation(0, "prose", 9.0), train(1), train(2)], "It was not evaluated twice."),
    ],
)
def test_headline_without_two_evaluations(tmp_path: Path, records: list[dict[str, object]], text: str) -> None:
    assert text in headline(arrange([read_run(write_run(tmp_path / "run", [start(), *records]))]))


def test_one_evaluation_is_no_change_and_splits_are_kept_apart(tmp_path: Path) -> None:
    records = [evaluation(0, "prose", 9.0), evaluation(0, "prose", 8.5, split="train"), train(1)]
    rows = _by_key(results(arrange([read_run(write_run(tmp_path / "run", [start(), *records]))])))
    assert set(rows) == {("pretrain", "prose (validation)"), ("pretrain", "prose (train)")}
    assert rows["pretrain", "prose (validation)"].change is None
    assert rows["pretrain", "prose (train)"].first_loss == 8.5


def test_a_source_that_was_trained_but_not_evaluated_has_a_row(tmp_path: Path) -> None:
    (row,) = results(arrange([read_run(write_run(tmp_path / "run", [start(), train(1)]))]))
    assert (row.source, row.first_loss, row.last_loss, row.tokens) == ("prose", None, None, TOKENS_PER_STEP)


def test_a_source_that_an_earlier_phase_named_but_never_read_is_not_forgotten(tmp_path: Path) -> None:
    unread = write_run(tmp_path / "a", [start(), train(1, tokens_by_source={"prose": 10, "code": 0})])
    after = write_run(tmp_path / "b", [start("continual"), *_both(0, 4.0, 5.0), train(1), *_both(1, 4.1, 3.0)])
    rows = _by_key(results(arrange([read_run(unread), read_run(after)])))
    assert [rows["continual", source].is_earlier for source in ("prose", "code")] == [True, False]


def test_a_split_is_named_only_where_there_are_several(tmp_path: Path) -> None:
    records = [evaluation(0, "prose", 9.0, split="held_out"), evaluation(0, "code", 9.0, split="held_out"), evaluation(0, "code", 9.0)]
    rows = results(arrange([read_run(write_run(tmp_path / "run", [start(), *records]))]))
    assert [row.name for row in rows] == ["prose", "code (held_out)", "code (validation)"]
