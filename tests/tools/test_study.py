"""Studies from their file to their page: what a definition may say, and a small study of real runs, stopped, continued and refused."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from megatron_ext.config import load_config
from megatron_ext.config.study import check_files, plan_runs, read_study
from megatron_ext.errors import ConfigError, DataError
from tests.report.test_page import Page
from tests.train.tiny_run import ROOT, records, write_run

TOOL = ROOT / "tools" / "study.py"
STEPS = 8


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """tools/study.py in this process, where it starts sooner; it takes over SIGTERM."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.setenv("COLUMNS", "160")
    handler = signal.getsignal(signal.SIGTERM)
    yield import_module("study")
    signal.signal(signal.SIGTERM, handler)


def write_study(folder: Path, **changes: Any) -> Path:
    """A study of two variants over the tiny run: one swept, one not, two seeds."""
    values: dict[str, Any] = {
        "title": "Tiny",
        "config": str(write_run(folder, train__steps=STEPS, evaluation__every=4)),
        "overrides": ["checkpoint.keep_last=1"],
        "seeds": [1, 2],
        "variants": {
            "plain": {"sweep": {"optimizer.lr": [0.001, 0.01]}},
            "heavy": {"overrides": ["optimizer.lr=0.01", "optimizer.betas=[0.5, 0.9]"]},
        },
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values | changes, sort_keys=False), "utf-8")
    return path


def run_tool(*arguments: str | Path, limit: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, env=environment(), timeout=limit, cwd=ROOT)


def environment() -> dict[str, str]:
    return os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


def final_loss(run_dir: Path) -> float:
    """Mean over the tokens of both corpora of the last evaluation."""
    last = [record for record in records(run_dir, "eval") if record["step"] == STEPS]
    assert len(last) == 2
    return sum(record["loss"] * record["eval_tokens"] for record in last) / sum(record["eval_tokens"] for record in last)


VARIANT = {"overrides": ["optimizer.lr=0.01"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sedes": [1]},
            "study.yaml line 18: sedes: no such key (its value: [1]); accepted: title, config, overrides, prepare, quantization, averaging",
        ),
        ({"variants": {"a": {"swep": {}}}}, "variants.a.swep: no such key (its value: {}); accepted: overrides, sweep; nearest: sweep"),
        ({"variants": {}}, "variants: {}; accepted: "),
        ({"variants": {"a/b": VARIANT}}, "variants.a/b: 'a/b'; accepted: a name of at most 40 letters"),
        ({"title": 3}, "study.yaml line 1: title: 3; accepted: text"),
        ({"seeds": []}, "seeds: []; accepted: "),
        ({"quantization": {"schemes": []}}, "quantization.schemes: []; accepted: "),
        ({"seeds": [1, 1]}, "seeds: [1, 1]; accepted: numbers that differ"),
        ({"seeds": [-1]}, "seeds.0: -1; accepted: greater than or equal to 0"),
        ({"overrides": ["optimizer.lr"]}, "overrides.0: 'optimizer.lr'; accepted: dotted.path=value"),
        ({"overrides": ["run_dir=x"]}, "overrides.0: 'run_dir=x'; accepted: another key: the study decides this one"),
        ({"variants": {"a": {"overrides": ["seed=1"]}}}, "variants.a.overrides.0: 'seed=1'; accepted: another key"),
        ({"variants": {"a": {"sweep": {"x": [1, 2], "y": [1, 2]}}}}, "variants.a.sweep: ['x', 'y']; accepted: one key"),
        ({"variants": {"a": {"sweep": {"seed": [1, 2]}}}}, "variants.a.sweep.seed: [1.0, 2.0]; accepted: another key"),
        ({"variants": {"a": {"sweep": {"optimizer.lr": [0.1]}}}}, "sweep.optimizer.lr: [0.1]; accepted: two or more numbers"),
        ({"variants": {"a": {"sweep": {"optimizer.lr": [0.2, 0.1]}}}}, "each larger than the one before"),
        ({"variants": {"a": {"sweep": {"optimizer.lr": [0.1, "high"]}}}}, "sweep.optimizer.lr.1: 'high'; accepted: a number"),
        ({"variants": {"a": VARIANT | {"sweep": {"optimizer.lr": [0.1, 0.2]}}}}, "no optimizer.lr, because it is swept"),
    ],
)
def test_a_wrong_definition_is_refused_with_file_and_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_study(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        read_study(path)
    assert str(caught.value).startswith(f"{path} line ") and message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": "absent.yaml"}, "absent.yaml: cannot be read"),
        ({"variants": {"a": {"overrides": ["optimizer.rat=1"]}}}, "optimizer.rat: no such key"),
        (
            {"variants": {"a": {"sweep": {"optimizer.lr": [-1, 0.1]}}}},
            "study.yaml: variants.a, optimizer.lr=-1, seed 1:\ncommand line: optimizer.lr: -1",
        ),
        ({"overrides": ["data.validation_fraction=0"]}, "data.validation: []; accepted: corpora, or data.validation_fraction"),
        ({"averaging": {"last": 3}}, "checkpoint.keep_last: 1; accepted: at least averaging.last (3)"),
        ({"quantization": {"schemes": ["W4A4"]}}, "data.validation: []; accepted: a corpus to evaluate quantized models on"),
    ],
)
def test_every_run_is_resolved_before_the_first_starts(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_study(tmp_path, **changes)
    with pytest.raises(ConfigError, match=r"study.yaml: variants\.") as caught:
        plan_runs(path, read_study(path), tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_runs_are_all_values_at_all_seeds_and_differ_in_nothing_else(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    runs = plan_runs(path, read_study(path), tmp_path / "a: b #1")
    assert [(run.variant, run.value, run.seed) for run in runs] == [
        *(("plain", value, seed) for value in (0.001, 0.01) for seed in (1, 2)),
        *(("heavy", None, seed) for seed in (1, 2)),
    ]
    assert len({run.directory for run in runs}) == 6 and runs[0].directory == tmp_path / "a: b #1/runs/plain/optimizer.lr=0.001/seed_1"
    assert [str(run) for run in runs[:5:4]] == ["plain, optimizer.lr 0.001, seed 1", "heavy, seed 1"]
    for run in runs:
        assert run.config.seed == run.seed and run.config.optimizer.lr == (run.value or 0.01)
        assert run.config.checkpoint.keep_last == 1 and run.config.optimizer.betas == ((0.5, 0.9) if run.value is None else (0.9, 0.95))


def test_whole_numbers_stay_whole(tmp_path: Path) -> None:
    path = write_study(tmp_path, variants={"a": {"sweep": {"train.steps": [4, 16]}}})
    assert [run.config.train.steps for run in plan_runs(path, read_study(path), tmp_path / "out")] == [4, 4, 16, 16]


def test_missing_data_are_named_with_the_command_that_makes_them(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    run = plan_runs(path, read_study(path), tmp_path / "out")[0]
    check_files(run, None)
    (tmp_path / "code.bin").unlink()
    with pytest.raises(DataError, match=r"code\.bin: no such file .* data\.sources\.1\.path of the run plain, .*; make it with: make data"):
        check_files(run, "make data")


def test_the_studies_of_norms_are_valid() -> None:
    for name, places in (("outliers", {"pre"}), ("depth", {"pre", "post", "peri", "mix"})):
        path = ROOT / "examples" / "studies" / f"{name}.yaml"
        study = read_study(path)
        runs = plan_runs(path, study, Path("out"))
        assert len(study.seeds) == 3 and {run.config.model.norm.placement for run in runs} == places
        assert len({(run.config.train.steps, run.config.data.tokens_per_step) for run in runs}) == 1
        assert all(run.config.train.steps % run.config.logging.probes_every == 0 for run in runs), "the last step is looked into"
        if name == "outliers":
            assert study.quantization is not None and "W4A4KV4" in study.quantization.schemes
            osp, recipe = runs[-1].config, load_config(ROOT / "examples/configs/outlier_safe.yaml", [])
            assert (osp.model.norm, osp.model.embedding_projection) == (recipe.model.norm, recipe.model.embedding_projection)
            assert (osp.optimizer.rule, osp.optimizer.muon.coefficients) == (recipe.optimizer.rule, recipe.optimizer.muon.coefficients)


def test_the_study_of_optimizers_is_valid() -> None:
    path = ROOT / "examples" / "studies" / "optimizers.yaml"
    study = read_study(path)
    runs = plan_runs(path, study, Path("out"))
    assert [variant for variant in study.variants] == ["adamw", "adamp", "muon", "normuon"] and len(study.seeds) == 3
    assert all(run.config.optimizer.rule == run.variant for run in runs)
    assert len({(run.config.train.steps, run.config.data.tokens_per_step) for run in runs}) == 1
    assert all(3 <= len(variant.swept_values) <= 4 for variant in study.variants.values())
    assert (ROOT / str(study.prepare).split()[1]).exists()


def test_the_end_of_metrics_is_read_while_they_are_written(tmp_path: Path, tool: ModuleType) -> None:
    last_step = import_module("study_runner").last_step
    assert last_step(tmp_path)[0] == 0
    lines = [json.dumps({"kind": "train", "step": step, "loss": 2.0, "filler": "{" * 1000}) for step in range(1000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "train", "st')
    assert last_step(tmp_path) == (999, 2.0)


def test_a_study_from_end_to_end_and_again(tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    quantization = {"schemes": ["W4A4KV4", "W8A8"], "data": str(tmp_path / "code"), "tokens": 300}
    study, out = write_study(tmp_path, quantization=quantization), tmp_path / "out"
    first = run_tool(study, "--output", out, "--parallel", "2", limit=240)
    assert first.returncode == 0, first.stderr
    assert "[5/5] " in first.stdout and first.stdout.count(": validation loss ") == 5 and f"study: {out / 'index.html'}" in first.stdout
    finals = {path.relative_to(out / "runs").parts: final_loss(path) for path in out.glob("runs/*/*/seed_*")}
    swept = {setting: loss for (name, setting, seed), loss in finals.items() if (name, seed) == ("plain", "seed_1")}
    best = min(swept, key=swept.__getitem__)
    assert len(finals) == 5 and ("plain", best, "seed_2") in finals and ("heavy", "default", "seed_2") in finals
    page = Page((out / "index.html").read_text("utf-8"))
    mean = (finals["plain", best, "seed_1"] + finals["plain", best, "seed_2"]) / 2
    assert page.tables[0][1][1].startswith(f"{mean:.3f}") and page.tables[0][2][0] == "heavy"
    rounded = [json.loads(path.read_text())["losses"] for path in sorted(out.glob("runs/heavy/*/*/quantization.json"))]
    assert page.tables[1][0] == ["variant", "unquantized", "W4A4KV4", "W8A8"] and len(rounded) == 2
    assert page.tables[1][2][2].startswith(f"{(rounded[0]['W4A4KV4'] + rounded[1]['W4A4KV4']) / 2:.3f}")
    assert abs(rounded[0]["W8A8"] - rounded[0]["unquantized"]) < abs(rounded[0]["W4A4KV4"] - rounded[0]["unquantized"])
    checkpoint = out / "runs/heavy/default/seed_1/checkpoints" / f"step_{STEPS:08d}"
    words = ["--model", checkpoint, "--data", tmp_path / "code", "--tokens", 300, "--schemes", "W4A4KV4", "--output", tmp_path / "alone"]
    assert import_module("quantize").main([*map(str, words)]) == 0
    alone = json.loads((tmp_path / "alone").read_text())["losses"]
    assert [each["loss"] for each in alone] == pytest.approx([rounded[0]["unquantized"], rounded[0]["W4A4KV4"]], rel=1e-6)
    capsys.readouterr()
    stamps = {
        path: path.stat().st_mtime_ns for pattern in ("metrics.jsonl", "quantization.json") for path in out.glob(f"runs/*/*/*/{pattern}")
    }

    assert tool.main([str(study), "--output", str(out)]) == 0
    again = capsys.readouterr().out
    assert ": validation loss" not in again
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps} and len(stamps) == 5 + 4
    assert again.split("study: ")[0] in first.stdout

    stale = out / "runs/heavy/default/seed_1/quantization.json"
    fewer = write_study(tmp_path, quantization=quantization | {"schemes": ["W8A8"]})
    assert tool.main([str(fewer), "--output", str(out)]) == 0
    assert list(json.loads(stale.read_text())["losses"]) == ["unquantized", "W8A8"]
    capsys.readouterr()
    changed = write_study(tmp_path, overrides=["checkpoint.keep_last=2"])
    assert tool.main([str(changed), "--output", str(out)]) == 1
    assert "made with another configuration: checkpoint.keep_last was 1 and is 2" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stopped_study_continues_and_refuses_a_second_one_beside_it(
    tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path, overrides=["train.steps=200"], seeds=[1], variants={"only": {}})
    run, command = tmp_path / "out/runs/only/default/seed_1", [sys.executable, TOOL, study, "--output", tmp_path / "out"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or '"step": 10,' not in (run / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    assert tool.main([str(study), "--output", str(tmp_path / "out")]) == 1
    assert "in use by another study" in capsys.readouterr().err
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "start the same command again to continue" in errors
    stopped = [record["step"] for record in records(run, "event") if record["event"] == "stop"]
    assert len(stopped) == 1 and 10 <= stopped[0] < 200
    assert tool.main([str(study), "--output", str(tmp_path / "out")]) == 0
    assert "There is one seed" in capsys.readouterr().out
    assert [record["step"] for record in records(run, "start")] == [0, stopped[0]]
    assert [record["step"] for record in records(run, "train")] == list(range(1, 201))


def test_a_failing_run_stops_the_study_with_its_last_lines(tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    study = write_study(tmp_path)
    (tmp_path / "code.bin").write_bytes(b"")
    assert tool.main([str(study), "--output", str(tmp_path / "out")]) == 1
    errors = capsys.readouterr().err
    assert "error: the run plain, optimizer.lr 0.001, seed 1 failed with exit status 2" in errors
    assert "  DataError: " in errors and "code.bin" in errors
    assert not (tmp_path / "out/index.html").exists() and len(list((tmp_path / "out").glob("runs/*/*/*"))) == 1


def test_an_unknown_scheme_is_refused_before_anything_runs(tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    study = write_study(tmp_path, quantization={"schemes": ["W4A4", "W1A4"], "data": str(tmp_path / "code")})
    assert tool.main([str(study), "--output", str(tmp_path / "out")]) == 1
    assert "study.yaml: quantization.schemes.1: quantization scheme 'W1A4'; accepted: WxAy" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("parallel", ["0", "-1", "two"])
def test_wrong_arguments_are_refused(tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str], parallel: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        tool.main([str(write_study(tmp_path)), "--output", str(tmp_path / "out"), f"--parallel={parallel}"])
    assert "accepted: a number, at least 1" in capsys.readouterr().err
