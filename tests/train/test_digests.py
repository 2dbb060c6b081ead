"""Whole runs that are compared by their digests: equal ones, and one for each way to part."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megatron_ext.config import dump_config, load_config
from megatron_ext.parallel.world import World
from megatron_ext.report.digests import Difference, cause, first_difference, read_digests
from megatron_ext.train.build import build_grid, prepare
from megatron_ext.train.engine import StepResult
from megatron_ext.train.trainer import Trainer
from tests.distributed import RunRanks
from tests.tools.loading import load_tool
from tests.train.tiny_run import losses, train, write_run

EVERY_STEP = ("logging.digests_every=1", "train.steps=4", "checkpoint.every=2", "evaluation.tokens=64")


def train_and_flip(world: World, config: Path, overrides: Sequence[str], at: int, name: str) -> None:
    """A run in which one bit of one parameter changes after the update of step ``at``."""
    options = load_config(config, list(overrides))
    Path(options.run_dir).mkdir(parents=True, exist_ok=True)
    world.barrier()
    setup = prepare(options)
    trainer = Trainer(setup, build_grid(setup, world))
    step = trainer.engine.step

    def flipping(*arguments: object) -> StepResult:
        result = step(*arguments)
        owned = next((owned for owned in trainer.optimizer.owned if owned.part.name == name), None)
        if trainer.step == at and owned is not None:
            owned.master.detach().view(torch.int32).view(-1)[3] ^= 1
        return result

    trainer.engine.step = flipping
    trainer.train()


@pytest.fixture(scope="module")
def straight(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps on two data ranks."""
    return run(run_ranks, tmp_path_factory.mktemp("straight"))


def run(run_ranks: RunRanks, folder: Path, *overrides: str, size: int = 2) -> Path:
    config = write_run(folder)
    run_ranks(size, train, config, [*EVERY_STEP, *overrides])
    return folder / "run"


def difference(one: Path, other: Path) -> tuple[Difference | None, str]:
    runs = read_digests(one), read_digests(other)
    found = first_difference(*runs)
    return found, "" if found is None else cause(found, *runs, [])


def test_equal_runs_are_equal_and_digests_change_nothing(run_ranks: RunRanks, straight: Path, tmp_path: Path) -> None:
    again, without = run(run_ranks, tmp_path / "again"), run(run_ranks, tmp_path / "without", "logging.digests_every=null")
    assert difference(straight, again) == (None, "")
    assert sorted(read_digests(again).steps) == [1, 2, 3, 4] and list(read_digests(again).begins) == [0]
    assert losses(without) == losses(straight) and not (without / "digests.jsonl").exists()


def test_a_resumed_run_is_equal_too(run_ranks: RunRanks, straight: Path, tmp_path: Path) -> None:
    resumed = tmp_path / "run"
    run(run_ranks, tmp_path)
    shutil.rmtree(resumed / "checkpoints/step_00000004")
    (resumed / "checkpoints/latest").write_text("step_00000002\n", "utf-8")
    run(run_ranks, tmp_path)
    assert sorted(read_digests(resumed).begins) == [0, 2]
    assert difference(straight, resumed) == (None, "")


def test_one_flipped_bit_is_found(run_ranks: RunRanks, straight: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    run_ranks(2, train_and_flip, write_run(tmp_path), EVERY_STEP, 3, name)
    found, why = difference(straight, tmp_path / "run")
    assert found is not None and (found.step, found.what, found.tensors) == (3, "parameters", (name,))
    assert "bits were changed" in why and found.relative < 1e-6


def test_another_seed_begins_from_other_weights(run_ranks: RunRanks, straight: Path, tmp_path: Path) -> None:
    found, why = difference(straight, run(run_ranks, tmp_path, "seed=8"))
    assert found is not None and (found.step, found.what) == (0, "begin")
    assert found.tensors[0] == "model.embed_tokens.weight" and "seed" in why


def test_another_learning_rate_is_named(run_ranks: RunRanks, straight: Path, tmp_path: Path) -> None:
    found, why = difference(straight, run(run_ranks, tmp_path, "optimizer.lr=0.0100001"))
    assert found is not None and (found.step, found.what) == (1, "learning rate") and "optimizer.lr" in why


def test_other_documents_are_named(run_ranks: RunRanks, straight: Path, tmp_path: Path) -> None:
    found, why = difference(straight, run(run_ranks, tmp_path, "data.sources.0.weight=9"))
    assert found is not None and (found.step, found.what) == (1, "documents") and "data" in why


@pytest.mark.parametrize(
    ("size", "overrides"), [(1, ()), (2, ("parallel.tp=2",)), (2, ("parallel.pp=2",)), (2, ("planning.policy=adaptive",))]
)
def test_another_grid_differs_in_last_bits_alone(
    run_ranks: RunRanks, straight: Path, tmp_path: Path, size: int, overrides: tuple[str, ...]
) -> None:
    other = run(run_ranks, tmp_path, *overrides, size=size)
    first, second = read_digests(straight).begins[0], read_digests(other).begins[0]
    assert {name: digest for name, (digest, _) in first.items()} == {name: digest for name, (digest, _) in second.items()}
    assert list(first) == list(second), "in the order of the model"
    found, why = difference(straight, other)
    assert found is None or (found.relative < 1e-5 and "last bits" in why)


def test_matrices_that_ranks_put_together_have_the_digests_of_the_whole(run_ranks: RunRanks, tmp_path: Path) -> None:
    """In float64 and one step: the same gradients to many digits, on a grid where Muon meets the parts of a matrix on one rank."""
    muon = ("optimizer.rule=muon", "train.dtype=float64", "train.steps=1", "schedule.warmup_steps=0")
    one, other = (run(run_ranks, tmp_path / str(size), *muon, *more, size=size) for size, more in ((1, ()), (2, ("parallel.tp=2",))))
    gradients = [read_digests(each).steps[1].gradients for each in (one, other)]
    assert {name: norm for name, (_, norm) in gradients[0].items()} == pytest.approx(
        {name: norm for name, (_, norm) in gradients[1].items()}, rel=1e-10
    )


def test_the_tool_prints_where_and_why(run_ranks: RunRanks, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = load_tool("compare_runs")
    other = run(run_ranks, tmp_path, "optimizer.lr=0.02")
    for folder, overrides in ((straight, EVERY_STEP), (other, (*EVERY_STEP, "optimizer.lr=0.02"))):
        (folder / "config.yaml").write_text(dump_config(load_config(folder.parent / "config.yaml", list(overrides))), "utf-8")
    assert tool.main([str(straight), str(straight)]) == 0
    assert "equal to the bit in 4 steps" in capsys.readouterr().out
    assert tool.main([str(straight), str(other)]) == 1
    printed = capsys.readouterr().out
    assert "step 1: learning rate" in printed and "setting: optimizer.lr 0.01 -> 0.02" in printed
    assert tool.main([str(straight), str(tmp_path / "nothing")]) == 2
    assert "digests.jsonl" in capsys.readouterr().err
