"""Calibration as a user calls it: what it writes and prints, and what it says when it cannot."""

import json
import subprocess
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_ext.config import load_config
from megatron_ext.errors import ConfigError
from megatron_ext.parallel.grid import GridShape
from megatron_ext.planning.cost_file import load_cost_model
from megatron_ext.planning.cost_model import CostModel, Curve
from megatron_ext.train.build import Setup, prepare
from tests.train.tiny_run import ROOT, start, write_run

SCRIPT = ROOT / "tools" / "calibrate.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return import_module("tools.calibrate")


def calibrated(folder: Path, ranks: int, *overrides: str) -> tuple[str, str]:
    """What a good end prints to standard output and error; the file is ``folder``/costs.json."""
    config = write_run(folder, planning__cost_model=str(folder / "costs.json"))
    process: subprocess.Popen[str] = start(
        config, "--output", str(folder / "costs.json"), "--rounds", "1", *overrides, ranks=ranks, script=SCRIPT
    )
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, output + errors
    return output, errors


def test_one_process_writes_what_a_run_reads_and_says_what_is_missing(tmp_path: Path) -> None:
    output, _ = calibrated(tmp_path, 1, "model.num_layers=3")
    assert "missing: all_to_all and ring_step" in output and f"wrote {tmp_path / 'costs.json'}" in output
    assert all(name in output for name in ("per_token_squared", "per_pack", "per_step", "efficiency", "R^2", "random pack 3 on each rank"))
    cost = load_cost_model(str(tmp_path / "costs.json"))
    assert cost.attention.layers == 3 and cost.tokens_per_rank == 32
    assert cost.all_to_all == () and cost.ring_step == Curve() and cost.per_step > 0
    values = json.loads((tmp_path / "costs.json").read_text("utf-8"))
    assert values["about"]["ranks"] == values["about"]["hosts"] == 1 and values["about"]["torch"] == torch.__version__
    assert values["about"]["grid"] == "pp 1 x dp 1 x tp 1" and len(values["about"]["relative_errors"]) == 3
    assert not (tmp_path / "run").exists(), "the run itself has not begun"
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.slow
def test_the_launcher_starts_it_like_a_run(tmp_path: Path) -> None:
    output, errors = calibrated(tmp_path, 2, "planning.policy=adaptive")
    assert "all_to_all of 2" in output and "ring_step" in output and "missing" not in output
    assert "random pack shared by 2 ranks" in output
    assert output.count("wrote ") == 1, "rank 0 alone speaks"
    cost = load_cost_model(str(tmp_path / "costs.json"))
    assert len(cost.all_to_all) == 1 and len(cost.ring_step.bytes) > 1
    assert json.loads((tmp_path / "costs.json").read_text("utf-8"))["about"]["ranks"] == 2
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["planning.tokens_per_pack=0"], ["planning.tokens_per_pack", "at least 1"]),
        (["planning.tokens=5"], ["planning.tokens"]),
        (["parallel.tp=2"], ["parallel.tp is 2", "does not divide the 1 ranks"]),
        (["model.attention=flash_attn", "train.dtype=float64", "--config", "{}/none.yaml"], ["none.yaml"]),
        (["--rounds", "0"], ["--rounds is 0", "at least 1"]),
        (["model.hidden_size=65536", "model.num_layers=200"], ["planning.tokens_per_pack is 32", "GiB", "tools/estimate_memory.py"]),
    ],
)
def test_errors_name_the_key_and_nothing_is_written(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    config = write_run(tmp_path)
    output = tmp_path / "costs.json"
    given = [argument.format(tmp_path) for argument in arguments]
    assert tool.main(["--config", str(config), "--output", str(output), *given]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("ConfigError: ") and all(word in errors for word in words), errors
    assert not output.exists()


def test_a_place_that_cannot_be_written_to_is_found_before_measuring(tool: ModuleType, tmp_path: Path) -> None:
    assert tool.why_not_writable(tmp_path / "costs.json") is None and not list(tmp_path.iterdir())
    assert tool.why_not_writable(tmp_path) == "a directory"
    assert tool.why_not_writable(tmp_path / "none" / "costs.json") == f"No such file or directory in '{tmp_path}/none'"
    (tmp_path / "file").touch()
    assert "Not a directory" in tool.why_not_writable(tmp_path / "file" / "costs.json")


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return prepare(load_config(write_run(tmp_path), []))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: ...")]
)
def test_memory_that_ends_is_told_with_the_key(tool: ModuleType, setup: Setup, error: Exception) -> None:
    told = pytest.raises(ConfigError, match=r"planning.tokens_per_pack is 32: .* pp 1 x dp 4 x tp 1 needs about")
    with told, tool.telling_memory_errors(setup, GridShape(1, 4, 1)):
        raise error


def test_other_errors_stay_what_they_are(tool: ModuleType, setup: Setup) -> None:
    with pytest.raises(RuntimeError, match="^something else$"), tool.telling_memory_errors(setup, GridShape(1, 1, 1)):
        raise RuntimeError("something else")


def test_the_table_has_units(tool: ModuleType) -> None:
    curves = (Curve((1024.0, 1048576.0), (1e-4, 1e-3)), Curve((512.0,), (2e-4,)))
    cost = CostModel(32, 2e-6, 3e-9, (16.0, 32.0), (0.25, 1.0), 4e-3, 0.5, all_to_all=curves, ring_step=curves[0])
    shown = {name: value for name, value, _ in tool.rows(cost)}
    assert shown["per_token"] == "2 us" and shown["per_token_squared"] == "3 ns" and shown["per_pack"] == "4 ms"
    assert shown["per_step"] == "500 ms" and shown["efficiency"] == "16: 25%, 32: 100%"
    assert shown["all_to_all of 2"] == shown["ring_step"] == "1 KiB 0.1 ms ... 1024 KiB 1 ms (1.05 GB/s)"
    assert shown["all_to_all of 4"].startswith("0.5 KiB 0.2 ms")


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def show(active: bool) -> str:
        with tool.showing_progress(active) as progress:
            progress(1, 4)
        return capsys.readouterr().err

    assert show(active=True) == ""
    monkeypatch.setattr(tool, "SECONDS_BETWEEN_LINES", 0.0)
    assert show(active=True) == "1 of 4 measurements, ETA 0 s\n"
    assert show(active=False) == ""
