import pytest

from megatron_ext.train import console
from megatron_ext.train.console import Console

RECORD = {"loss": 3.25, "lr": 3e-4, "grad_norm": 0.5, "memory_gib": 1.5, "skipped_steps": 0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds; tests move it."""
    now = [100.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    return now


def test_a_line_says_rates_since_the_last_line_and_the_time_left(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    screen = Console(active=True, total_steps=200)
    screen.start_clock()
    for _ in range(10):
        screen.count(1000)
    clock[0] += 5.0
    screen.step_line({"step": 10, **RECORD}, flops_per_token=1e9)
    screen.count(1000)
    clock[0] += 1.0
    screen.step_line({"step": 11, **RECORD}, flops_per_token=1e9)
    first, second = capsys.readouterr().out.splitlines()
    assert first.split(" | ") == [
        *["step  10/200   5%", "loss  3.2500", "lr 3.00e-04", "grad norm   0.500", "    2,000 tokens/s", "  2.000 TFLOP/s", "  1.50 GiB"],
        *["ETA 0:01:35", "skipped 0"],
    ]
    assert "    1,000 tokens/s" in second and "ETA 0:03:09" in second


def test_lines_are_aligned(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    screen = Console(active=True, total_steps=1000)
    for step, loss in ((1, 11.5), (1000, 2.25)):
        screen.step_line({"step": step, **RECORD, "loss": loss}, 1e9)
    first, second = capsys.readouterr().out.splitlines()
    assert [i for i, c in enumerate(first) if c == "|"] == [i for i, c in enumerate(second) if c == "|"]


def test_a_banner_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    Console(active=True, total_steps=1).banner({"ranks": "2", "parameters": "1,000"})
    assert capsys.readouterr().out == "  ranks       2\n  parameters  1,000\n"


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Console(active=False, total_steps=1)
    screen.say("text")
    screen.banner({"ranks": "2"})
    screen.step_line({"step": 1, **RECORD}, 1e9)
    assert capsys.readouterr().out == ""
