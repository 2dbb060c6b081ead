"""Losses by share and tokens, from run directories and tables."""

from pathlib import Path

import numpy as np
import pytest

from megatron_ext.errors import DataError
from megatron_ext.report.mixture_points import read_mixture_runs, read_mixture_table
from tests.report.fake_runs import TOKENS_PER_STEP, evaluation, start, train, write_run


def run(directory: Path, share: float, begin: float = 4.0, drift: float = 0.0, first: int = 0) -> Path:
    """Ten steps with evaluations before the first and after every fifth; ``drift`` is added to the share in the second half."""
    records, code = [start(directory.name)], 0.0
    for step in range(11):
        if step:
            code += TOKENS_PER_STEP * (share + drift * (step > 5))
            tokens = step * TOKENS_PER_STEP
            records.append(train(step, tokens_by_source={"prose": int(tokens - code), "code": int(code)}))
        if step % 5 == 0 and step >= first:
            records += [evaluation(step, "prose", begin + 0.01 * step * share), evaluation(step, "wiki", 2.0, eval_tokens=3 * 65536)]
            records.append(evaluation(step, "code", 5.0 - 0.1 * step * share))
    return write_run(directory, records)


def test_points_of_runs(tmp_path: Path) -> None:
    found = read_mixture_runs([run(tmp_path / "a", 0.25), run(tmp_path / "b", 0.5)], ["prose", "wiki"], ["code"])
    assert found.start == pytest.approx((4.0 + 3 * 2.0) / 4)
    np.testing.assert_allclose(found.share, [0.25, 0.25, 0.5, 0.5], atol=1e-4)
    np.testing.assert_array_equal(found.tokens, [5 * TOKENS_PER_STEP, 10 * TOKENS_PER_STEP] * 2)
    np.testing.assert_allclose(found.domain, [5 - 0.125, 5 - 0.25, 5 - 0.25, 5 - 0.5])
    np.testing.assert_allclose(found.general, found.start + np.array([0.0125, 0.025, 0.025, 0.05]) / 4)
    late = found.points("general", 6 * TOKENS_PER_STEP)
    assert late.run.tolist() == [0, 1] and late.loss.tolist() == found.general[[1, 3]].tolist()


def test_runs_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    good = run(tmp_path / "good", 0.25)
    for directory, sources, message in (
        (run(tmp_path / "other", 0.5, begin=4.1), ["prose"], "other begins with a general loss of 4.1000, .*good with 4.0000"),
        (
            run(tmp_path / "drift", 0.2, drift=0.2),
            ["prose"],
            r"drift/metrics.jsonl: code had 0\.240 of the tokens in the first half and 0\.4",
        ),
        (run(tmp_path / "late", 0.5, first=1), ["prose"], "late/metrics.jsonl: no evaluation before step 1"),
        (good, ["news"], "good/metrics.jsonl: step 0 has no evaluation of 'news'; it has code, prose, wiki"),
    ):
        with pytest.raises(DataError, match=message):
            read_mixture_runs([good, directory], sources, ["code"])


def table(path: Path, *lines: str, header: str = "share,tokens,general_loss,domain_loss") -> Path:
    path.write_text("\n".join((header, *lines)) + "\n", "utf-8")
    return path


def test_points_of_a_table(tmp_path: Path) -> None:
    header = "run,share,tokens,general_loss,domain_loss"
    path = table(tmp_path / "t.csv", "x,0.5,0,3,4", "x,0.5,1e6,3.1,3.5", "y,0.5,1e6,3.2,3.6", "z,0,1e6,2.9,4", header=header)
    found = read_mixture_table(path)
    assert found.start == 3.0 and found.run.tolist() == [0, 1, 2] and found.general.tolist() == [3.1, 3.2, 2.9]
    assert found.points("domain", 0.0).share.tolist() == [0.5, 0.5], "a run without domain data has no place in a power law of its share"
    assert found.points("general", 0.0).share.tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1.5,1,3,4", r"t.csv:3: share is '1.5'; accepted: a number from 0 to 1"),
        ("x,1,3,4", r"t.csv:3: share is 'x'"),
        ("0.5,-1,3,4", r"t.csv:3: tokens is '-1'; accepted: a number, at least 0"),
        ("0.5,1,inf,4", r"t.csv:3: general_loss is 'inf'; accepted: a loss, more than 0"),
        ("0.5,1,3", r"t.csv:3: domain_loss is null"),
        ("0.5,0,3.5,4", r"t.csv:3 begins with a general loss of 3.5000, .*t.csv:2 with 3.0000"),
    ],
)
def test_tables_name_the_line_and_the_column(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_mixture_table(table(tmp_path / "t.csv", "0.5,0,3,4", line, "0.5,1e6,3,4"))


def test_tables_without_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t.csv:1: no column 'domain_loss'"):
        read_mixture_table(table(tmp_path / "t.csv", header="share,tokens,general_loss"))
    with pytest.raises(DataError, match="0 rows with 0 tokens and 1 with more"):
        read_mixture_table(table(tmp_path / "t.csv", "0.5,1,3,4"))
    with pytest.raises(DataError, match=r"none.csv: cannot be read"):
        read_mixture_table(tmp_path / "none.csv")
