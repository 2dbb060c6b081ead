"""Runs as a user starts and stops them: real processes, real signals, the deepspeed launcher."""

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_ext.report.metrics import read_run
from tests.distributed import RunRanks
from tests.train.tiny_run import ROOT, losses, master_weights, records, start, train, write_run

CHECKPOINTS = "run/checkpoints"
LONG = {"train__steps": 150, "checkpoint__every": 2, "logging__every": 50}
LAST = "step_00000150"


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    """Until ``condition``; fails with the process's own words if it ends first."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"the run ended with {process.returncode} before the moment came:\n{''.join(process.communicate())}")
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.001)


def last_step(run_dir: Path) -> int:
    """Of the records of the run, also while it writes them."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text("utf-8") if path.exists() else ""
    return text.count('"kind": "train"')


def saving(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob(".step_*.tmp"))


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Processes that train, by rank: children of the launcher that run the script themselves."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        arguments = child.cmdline()
        if any(argument.endswith("pretrain.py") for argument in arguments[:4]) and "deepspeed.launcher.launch" not in arguments:
            found[int(child.environ()["RANK"])] = child
    return [found[rank] for rank in sorted(found)]


def finish(process: subprocess.Popen[str], seconds: float = 180.0) -> tuple[int, str]:
    """(exit code, what was printed)."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out + err


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9 of the run and all its ranks."""
    for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        each.kill()
    process.communicate(timeout=60)


def assert_same_run(folder: Path, reference: Path) -> None:
    """Losses, master weights, moments and exported weights bit for bit."""
    assert losses(folder / "run") == losses(reference / "run")
    seen, expected = (master_weights(each / CHECKPOINTS / LAST) for each in (folder, reference))
    assert seen.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in seen.items())
    seen, expected = ((each / CHECKPOINTS / LAST / "model.safetensors").read_bytes() for each in (folder, reference))
    assert seen == expected


@pytest.mark.slow  # starts through the launcher, again and again
def test_killed_again_and_again_a_run_ends_as_if_it_never_was(run_ranks: RunRanks, tmp_path: Path) -> None:
    """kill -9 at a random step and in the middle of a save, then stopped by ``tools/stop.py``, then to the end."""
    reference, folder = tmp_path / "reference", tmp_path / "killed"
    run_ranks(1, train, write_run(reference, **LONG))
    config = write_run(folder, **LONG)
    step = random.Random().randint(5, 30)
    moments = {
        f"at step {step}": lambda: last_step(folder / "run") >= step,
        "during a save": lambda: last_step(folder / "run") >= 50 and saving(folder / "run"),
    }
    for name, moment in moments.items():
        process = start(config)
        wait_for(moment, process)
        kill(process)
        assert last_step(folder / "run") < 150, f"the run was over before it was killed {name}"
    process = start(config)
    wait_for(lambda: last_step(folder / "run") >= 80, process)
    stop = subprocess.run([sys.executable, ROOT / "tools" / "stop.py", folder / "run"], capture_output=True, text=True, check=False)
    assert stop.returncode == 0 and f"wrote {folder / 'run' / 'stop'}" in stop.stdout
    code, text = finish(process)
    assert code == 0 and "on request" in text, text
    stopped = stop_event(folder)
    assert 80 <= stopped < 150
    code, text = finish(start(config))
    assert code == 0 and f"step_{stopped:08d}" in text and "finished: step 150" in text, text
    assert not (folder / "run" / "stop").exists()
    assert_same_run(folder, reference)
    assert [path.name for path in sorted((folder / CHECKPOINTS).iterdir())] == ["latest", "step_00000148", LAST]
    run = read_run(folder / "run")
    assert [record.step for record in run.train] == list(range(1, 151))


def test_the_launcher_kills_stops_and_resumes(run_ranks: RunRanks, tmp_path: Path) -> None:
    """Two ranks through ``deepspeed``: one rank killed, then SIGTERM to one rank, then to the end."""
    reference, folder = tmp_path / "reference", tmp_path / "launched"
    run_ranks(2, train, write_run(reference, **LONG))
    config = write_run(folder, **LONG)

    process = start(config, ranks=2)
    wait_for(lambda: last_step(folder / "run") >= 15, process)
    ranks_of(process)[1].kill()
    code, text = finish(process)
    assert code != 0, text

    process = start(config, ranks=2)
    wait_for(lambda: last_step(folder / "run") >= 40, process)
    rank = ranks_of(process)[1]
    for _ in range(20):
        if rank.is_running():
            rank.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    code, text = finish(process)
    assert code == 0 and "on request" in text, text
    stopped = stop_event(folder)
    assert 40 <= stopped < 150 and (folder / CHECKPOINTS / "latest").read_text() == f"step_{stopped:08d}\n"

    code, text = finish(start(config, ranks=2))
    assert code == 0 and f"step_{stopped:08d}" in text and "finished: step 150" in text, text
    assert_same_run(folder, reference)


def stop_event(folder: Path) -> int:
    """The step after which the run last stopped on request."""
    return next(record["step"] for record in reversed(records(folder / "run", "event")) if record["event"] == "stop")


def outcome(config: Path, *overrides: str) -> tuple[int, str]:
    process = start(config, *overrides)
    out, err = process.communicate(timeout=120)
    return process.returncode, err if process.returncode else out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "optimizer.lrr"),
        ("train.steps=-1", "train.steps"),
        ("data.replay.share=0.5", "data.replay"),
    ],
)
def test_a_wrong_configuration_is_one_line_and_exit_code_2(tmp_path: Path, override: str, message: str) -> None:
    code, err = outcome(write_run(tmp_path), override)
    lines = [line for line in err.splitlines() if "ConfigError" in line or "Traceback" in line]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("ConfigError: ") and message in err, err
    assert not (tmp_path / "run").exists(), "nothing was started"


def test_missing_data_are_refused_before_the_run_directory_exists(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    (tmp_path / "code.idx").unlink()
    code, err = outcome(config)
    assert code == 2 and "DataError" in err and "code.idx" in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_wrong_vocabulary_names_file_and_document(tmp_path: Path) -> None:
    code, err = outcome(write_run(tmp_path), "model.vocab_size=20")
    assert code == 2 and "Traceback" not in err
    assert "is outside the model's vocabulary of 20" in err and ".bin, document " in err


def test_a_dry_run_prints_and_starts_nothing(tmp_path: Path) -> None:
    code, out = outcome(write_run(tmp_path), "--dry-run")
    assert code == 0 and "token budget     2,048 at most" in out and "prose: 66.7% of the tokens" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_degree_beyond_the_ranks_is_refused_before_the_run_directory_exists(tmp_path: Path, dry: tuple[str, ...]) -> None:
    code, err = outcome(write_run(tmp_path), "planning={policy: static, degree: 2}", *dry)
    assert code == 2 and "planning.degree is 2; accepted with 1 data ranks and 4 query heads on each: 1" in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_stop_refuses_what_is_no_run(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, ROOT / "tools" / "stop.py", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr == f"error: {tmp_path} is no run directory: it has no config.yaml\n"
    assert list(tmp_path.iterdir()) == []


def test_the_configuration_of_the_run_starts_it_again(run_ranks: RunRanks, tmp_path: Path) -> None:
    """config.yaml in the run directory is the whole configuration; the checkpoint loads in transformers as it lies."""
    config = write_run(tmp_path, train__steps=2)
    code, out = outcome(config)
    assert code == 0 and "finished: step 2" in out, out
    code, out = outcome(tmp_path / "run" / "config.yaml", "train.steps=3")
    assert code == 0 and "step_00000002" in out and "finished: step 3" in out, out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / CHECKPOINTS / "step_00000003")
    assert model.config.vocab_size == 64
    shutil.rmtree(tmp_path / "run")
