"""Supervised runs as a user starts them: real processes, real signals."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_ext.train.file_lock import FileLock
from megatron_ext.train.supervisor_log import last_step
from tests.distributed import RunRanks
from tests.tools.loading import load_tool
from tests.train.tiny_run import ROOT, losses, train, write_run

FOUR = {"parallel__tp": 2, "schedule__kind": "constant", "checkpoint__every": 3, "train__dtype": "float64", "planning__ahead": 0}


def supervise(config: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tools" / "supervise.py"), "--config", str(config), "--grace", "5", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=environment, cwd=ROOT, text=True, start_new_session=True, **pipes)


def events(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "supervisor.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 400.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended too soon: {process.communicate()[0]}"
        assert time.monotonic() < end, "the moment never came"
        time.sleep(0.005)


def finish(process: subprocess.Popen[str], seconds: float = 400.0) -> tuple[int, str]:
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def kill_rank_after(rank: int, step: int, run_dir: Path) -> None:
    """kill -9 of a rank of the supervisor in this process, once ``step`` is trained."""
    while last_step(run_dir / "metrics.jsonl") < step:
        time.sleep(0.005)
    next(child for child in psutil.Process().children(recursive=True) if child.name() == f"rank {rank}").kill()


def launched_rank(supervisor: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The process that trains, not its guard."""
    return next(
        child
        for child in psutil.Process(supervisor.pid).children(recursive=True)
        if any(word.endswith("pretrain.py") for word in child.cmdline()[:3]) and child.environ().get("RANK") == str(rank)
    )


@pytest.mark.slow  # starts through the launcher, again and again
def test_through_the_launcher_a_rank_is_killed_and_sigterm_ends_the_run_in_good_order(run_ranks: RunRanks, tmp_path: Path) -> None:
    long = {"train__steps": 5000, "schedule__kind": "constant", "checkpoint__every": 5, "logging__every": 1000}
    config, run_dir = write_run(tmp_path / "launched", **long), tmp_path / "launched" / "run"
    process = supervise(config, "--local", "2")
    wait_for(lambda: last_step(run_dir / "metrics.jsonl") >= 6, process)
    launched_rank(process, 1).kill()
    wait_for(lambda: "restart" in [event["event"] for event in events(run_dir)], process)
    resumed = events(run_dir)[-1]["step"]
    process.send_signal(signal.SIGTERM)
    code, text = finish(process)
    assert code == 0 and "rank 1 on localhost was killed by SIGKILL" in text and "on request" in text, text
    assert [event["event"] for event in events(run_dir)] == ["start", "failure", "restart", "stop", "end"]
    stopped = events(run_dir)[-1]["step"]
    assert stopped > resumed >= 5 and not (run_dir / "stop").exists()
    run_ranks(2, train, write_run(tmp_path / "reference", **long | {"train__steps": stopped}))
    assert losses(run_dir) == losses(tmp_path / "reference" / "run")


@pytest.fixture
def signals_restored() -> Iterator[None]:
    """The supervisor, in this process, takes them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals_restored")
def test_a_killed_rank_and_a_damaged_checkpoint_change_no_loss(
    run_ranks: RunRanks, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """kill -9 of a rank: the same grid, bit-equal. Then the newest checkpoint is damaged: the next older one is taken, and says why."""
    run_ranks(4, train, write_run(tmp_path / "reference", train__steps=40, **FOUR))
    config, run_dir = write_run(tmp_path / "killed", train__steps=33, **FOUR), tmp_path / "killed" / "run"

    options = ["--local", "4", "--fork", "--grace", "5", "--config", str(config)]
    killer = threading.Thread(target=kill_rank_after, args=(2, 5, run_dir))
    killer.start()
    assert load_tool("supervise").main(options) == 0
    killer.join()
    text = capfd.readouterr().out
    assert "supervisor: rank 2 on localhost was killed by SIGKILL" in text and "finished: step 33" in text, text
    start, failure, restart, end = events(run_dir)
    assert [start["event"], failure["event"], restart["event"], end["event"]] == ["start", "failure", "restart", "end"]
    assert failure["rank"] == restart["rank"] == 2 and failure["step"] >= 5
    assert restart["grid"] == restart["grid_before"] == {"pp": 1, "dp": 2, "tp": 2} and 3 <= restart["step"] == failure["saved"]

    newest = run_dir / "checkpoints" / "step_00000033"
    weights = bytearray((newest / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (newest / "model.safetensors").write_bytes(weights)
    assert load_tool("supervise").main([*options, "train.steps=40"]) == 0
    text = capfd.readouterr().out
    assert "is altered" in text and "from " + str(newest.with_name("step_00000030")) in text, text
    assert [event["event"] for event in events(run_dir)[4:]] == ["passed_over", "start", "end"]
    assert losses(run_dir) == losses(tmp_path / "reference" / "run") and len(losses(run_dir)) == 40


def stand_in(folder: Path, text: str) -> str:
    """A script in the place of the training script."""
    (folder / "script.py").write_text(text, "utf-8")
    return str(folder / "script.py")


@pytest.mark.usefixtures("signals_restored")
def test_a_run_that_gets_nowhere_is_given_up(tmp_path: Path) -> None:
    config, script = write_run(tmp_path), stand_in(tmp_path, "raise RuntimeError('the same again')")
    options = ["--local", "2", "--fork", "--max-stuck", "2", "--grace", "3", "--pause", "0", "--script", script]
    assert load_tool("supervise").main([*options, "--config", str(config)]) == 1
    seen = events(tmp_path / "run")
    assert [event["event"] for event in seen] == ["start", "failure", *["restart", "failure"] * 2, "give_up"]
    assert "2 restarts in a row brought no new checkpoint" in seen[-1]["reason"]
    assert "ended with code 1: RuntimeError: the same again" in seen[1]["reason"]


@pytest.mark.usefixtures("signals_restored")
def test_a_second_supervisor_is_refused_and_leaves_the_run_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, run_dir = write_run(tmp_path), tmp_path / "run"
    run_dir.mkdir()
    first = FileLock(run_dir / "supervisor_lock.json", lambda owner: "")
    with first:
        assert load_tool("supervise").main(["--local", "1", "--fork", "--config", str(config)]) == 2
        assert f"run_dir: {run_dir} is supervised by process {os.getpid()} on host" in capsys.readouterr().err
        assert [path.name for path in run_dir.iterdir()] == ["supervisor_lock.json"] and first.holds()


@pytest.mark.usefixtures("signals_restored")
def test_what_looks_like_the_word_of_a_guard_and_a_log_that_cannot_be_written_end_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = stand_in(tmp_path, "print('rank ended: {oops}\\n' * 20000, flush=True)")
    (tmp_path / "run" / "supervisor.jsonl").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "train", "step": 3}\n{"kind": "train", "st\n', "utf-8")
    assert load_tool("supervise").main(["--local", "1", "--script", script, "--config", str(write_run(tmp_path))]) == 0
    printed, errors = capfd.readouterr()
    assert printed.count("rank ended: {oops}") == 20000 and "supervisor.jsonl cannot be written: Is a directory" in errors


def test_a_line_that_cannot_be_read_is_passed_over_and_said(tmp_path: Path) -> None:
    path, said = tmp_path / "metrics.jsonl", []
    path.write_text('{"kind": "train", "step": 3}\n{"kind": "train", "st\n{"kind": "train", "step": null}\n', "utf-8")
    assert last_step(path, said.append) == 3 and len(said) == 2 and all(str(path) in line for line in said)


@pytest.mark.usefixtures("signals_restored")
def test_what_would_fail_so_again_is_not_started_again(tmp_path: Path) -> None:
    script = stand_in(tmp_path, "print('DataError: a document', flush=True)\nimport os\nos._exit(2)")
    assert load_tool("supervise").main(["--local", "1", "--fork", "--script", script, "--config", str(write_run(tmp_path))]) == 2
    assert [event["event"] for event in events(tmp_path / "run")] == ["start", "failure", "give_up"]


@pytest.mark.usefixtures("signals_restored")
def test_sigterm_while_the_run_fails_is_no_reason_to_start_it_again(tmp_path: Path) -> None:
    script = stand_in(
        tmp_path, "import os, signal\nos.kill(int(os.environ['SUPERVISOR']), signal.SIGTERM)\nimport time\ntime.sleep(1)\n1/0"
    )
    os.environ["SUPERVISOR"] = str(os.getpid())
    try:
        assert load_tool("supervise").main(["--local", "1", "--fork", "--script", script, "--config", str(write_run(tmp_path))]) == 1
    finally:
        del os.environ["SUPERVISOR"]
    seen = events(tmp_path / "run")
    assert [event["event"] for event in seen] == ["start", "stop", "failure", "give_up"] and seen[-1]["reason"] == "it was asked to stop"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--local", "2", "optimizer.lrr=1"], "optimizer.lrr"),
        (["--local", "3", "parallel.tp=2"], "does not divide the 3 ranks"),
        (["--hosts", "a:2,a:2"], "'a 2'; accepted: a hostfile"),
        (["--hosts", "a:2,b:0"], "'b 0'; accepted: a hostfile"),
        (["--hosts", "localhost:2,b:2"], "by a name that the others resolve"),
        (["--hosts", "a:1,b:1", "--fork"], "accepted where ranks are forked: this one"),
        (["--local", "1", "--grace", "60"], "--grace is 60.0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert load_tool("supervise").main([*arguments, "--config", str(write_run(tmp_path))]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
