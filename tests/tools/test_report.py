import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report.fake_runs import plan, shared, start, three_runs, train, write_run

TOOL = Path(__file__).parents[2] / "tools" / "report.py"


def _main(*arguments: str | Path) -> int:
    return runpy.run_path(str(TOOL))["main"](list(map(str, arguments)))


def test_writes_the_page_into_the_last_run_and_prints_the_table(tmp_path: Path) -> None:
    runs = three_runs(tmp_path)
    command = [sys.executable, TOOL, runs["pretrain"], runs["continual"], "--compare", f"without replay={runs['no_replay']}", "--text"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    page = runs["continual"] / "report.html"
    assert page.read_text("utf-8").startswith("<!doctype html>")
    assert f"report: {page}" in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["continual", "prose", "4.251", "4.327", "+1.8", "%", "6.410", "184", "k", "0.35"] in lines
    assert ["without", "replay", "prose", "4.251", "5.137", "+20.9", "%", "6.410", "0", "n/a"] in lines
    assert not (runs["pretrain"] / "report.html").exists()


def test_output_goes_where_it_is_told_and_no_table_is_printed_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [start("[red]name[/red]"), train(1)])
    assert _main(run, "--output", tmp_path / "page.html") == 0
    assert capsys.readouterr().out == f"report: {tmp_path / 'page.html'}\n"
    assert not (run / "report.html").exists()
    assert _main(run, "--text") == 0
    assert "[red]name[/red]" in capsys.readouterr().out


def test_the_table_is_followed_by_how_ranks_shared_packs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [start(), shared(1, plan_policy="static")])
    assert _main(run, "--text", "--output", tmp_path / "page.html") == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "planning policy: static; median gap to the bound: 2.0 %; median share of exchanges: 12.5 %; waited for plans: 1 ms" in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/absent"], "absent: no such run directory"),
        (["{}/run", "--compare", "{}/run"], "expected LABEL=RUN"),
        (["{}/run", "--compare", "x={}/absent"], "absent: no such run directory"),
        (["{}/run", "--compare", "x={}/run", "--compare", "x={}/run"], "the label 'x' is already that of"),
        (["{}/run", "--output", "{}/absent/page.html"], "there is no directory"),
        (["{}/broken"], "metrics.jsonl:2: not a record"),
        (["{}/garbled"], "metrics.jsonl:3: not a record"),
    ],
)
def test_errors_name_what_is_wrong_and_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write_run(tmp_path / "run", [start(), train(1)])
    write_run(tmp_path / "broken", [start(), "garbage", train(1)])
    write_run(tmp_path / "garbled", [start(), shared(1), plan(1, [[0, 3, 1, 10, 1, 0.0, 1.0]])])
    assert _main(*(argument.format(tmp_path) for argument in arguments)) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and message in printed.err
    assert list(tmp_path.rglob("*.html")) == []
