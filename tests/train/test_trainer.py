"""Whole runs: exact resume, also after a kill, on the same and on another number of ranks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_ext.report.metrics import read_run
from tests.distributed import RunRanks
from tests.train.tiny_run import losses, master_weights, records, train, write_run

CHECKPOINTS = "run/checkpoints"


def same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def largest_error(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((value - second[name]).abs().max() / second[name].abs().max()) for name, value in first.items())


def drop_after(folder: Path, step: int) -> None:
    """Leave the run as it was when it had saved ``step`` and trained a little further."""
    for path in (folder / CHECKPOINTS).glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    (folder / CHECKPOINTS / "latest").write_text(f"step_{step:08d}\n", "utf-8")


@pytest.fixture(scope="module")
def straight(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps on two ranks, never interrupted, with all its checkpoints (3, 6, 8)."""
    folder = tmp_path_factory.mktemp("straight")
    run_ranks(2, train, write_run(folder, checkpoint__keep_last=9))
    return folder


def copy_of(straight: Path, target: Path, until: int) -> Path:
    """The straight run cut back to the checkpoint of step ``until``; returns its configuration."""
    config = write_run(target, checkpoint__keep_last=9)
    shutil.copytree(straight / "run", target / "run")
    drop_after(target, until)
    return config


def test_a_run_writes_what_the_report_reads(straight: Path) -> None:
    run = read_run(straight / "run") if (straight / "run" / "config.yaml").exists() else None
    if run is None:  # written by ``pretrain``, which joins the ranks itself
        shutil.copy(straight / "config.yaml", straight / "run" / "config.yaml")
        run = read_run(straight / "run")
    assert [record.step for record in run.train] == list(range(1, 9))
    assert {(record.step, record.source, record.split) for record in run.evals} == {
        (step, source, "held_out") for step in (0, 8) for source in ("prose", "code")
    }
    assert run.starts[0].ranks == 2 and run.sources == ["prose", "code"]
    assert sum(run.tokens_by_source.values()) == run.tokens == run.train[-1].tokens
    assert sum(run.length_histogram.values()) > 0 and not run.torn
    assert run.train[-1].loss < run.train[0].loss, "the run learns something"


@pytest.mark.parametrize("step", [3, 6])
def test_resume_on_the_same_ranks_is_bit_exact(run_ranks: RunRanks, straight: Path, tmp_path: Path, step: int) -> None:
    config = copy_of(straight, tmp_path, until=step)
    run_ranks(2, train, config)
    assert losses(tmp_path / "run") == losses(straight / "run")
    evals = [[(r["step"], r["source"], r["loss"]) for r in records(folder / "run", "eval")] for folder in (tmp_path, straight)]
    assert evals[0] == evals[1]
    for saved in ("step_00000006", "step_00000008"):
        assert same_tensors(master_weights(tmp_path / CHECKPOINTS / saved), master_weights(straight / CHECKPOINTS / saved))
    states = [json.loads((folder / CHECKPOINTS / "step_00000008/trainer_state.json").read_text()) for folder in (tmp_path, straight)]
    assert states[0]["data"] == states[1]["data"] and states[0]["tokens"] == states[1]["tokens"] and states[0]["rng"] == states[1]["rng"]


def test_the_comparison_notices_a_slightly_different_run(run_ranks: RunRanks, straight: Path, tmp_path: Path) -> None:
    run_ranks(2, train, copy_of(straight, tmp_path, until=6), ["optimizer.lr=0.0100001"])
    seen, expected = losses(tmp_path / "run"), losses(straight / "run")
    assert seen[7] == expected[7] and seen[8] != expected[8]
    assert not same_tensors(*(master_weights(folder / CHECKPOINTS / "step_00000008") for folder in (tmp_path, straight)))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_resume_on_other_ranks_agrees_within_reduction_order(run_ranks: RunRanks, tmp_path: Path, before: int, after: int) -> None:
    whole = write_run(tmp_path / "whole", train__dtype="float64")
    run_ranks(before, train, whole)
    parted = write_run(tmp_path / "parted", train__dtype="float64")
    shutil.copytree(tmp_path / "whole/run", tmp_path / "parted/run")
    drop_after(tmp_path / "parted", 6)
    run_ranks(after, train, parted)
    expected = losses(tmp_path / "whole/run")
    assert losses(tmp_path / "parted/run") == pytest.approx(expected, rel=1e-10, abs=0)
    seen, reference = (master_weights(tmp_path / name / CHECKPOINTS / "step_00000008") for name in ("parted", "whole"))
    assert {name: value for name, value in seen.items() if value.ndim}.keys() == reference.keys()
    assert largest_error(seen, reference) < 1e-8


def test_bf16_run_resumes_bit_exactly_from_float32_masters(run_ranks: RunRanks, tmp_path: Path) -> None:
    whole = write_run(tmp_path / "whole", train__dtype="bfloat16")
    run_ranks(2, train, whole)
    parted = write_run(tmp_path / "parted", train__dtype="bfloat16")
    shutil.copytree(tmp_path / "whole/run", tmp_path / "parted/run")
    drop_after(tmp_path / "parted", 6)
    run_ranks(2, train, parted)
    assert losses(tmp_path / "parted/run") == losses(tmp_path / "whole/run")
    weights = [master_weights(tmp_path / name / CHECKPOINTS / "step_00000008") for name in ("parted", "whole")]
    assert same_tensors(*weights) and {value.dtype for value in weights[0].values()} == {torch.float32}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / CHECKPOINTS / "step_00000008", dtype="auto")
    assert model.dtype == torch.bfloat16
    exported = dict(model.named_parameters())
    for name, value in weights[0].items():
        parameter, kind = name.split("|")
        if kind == "master":
            assert torch.equal(exported[parameter], value.bfloat16()), parameter
