"""The learning rate of whole runs: by the formula at every step, across resumes, overrides and branches."""

import shutil
from pathlib import Path

import pytest
import torch

from megatron_ext.errors import ConfigError
from megatron_ext.report.metrics import read_run
from tests.distributed import RunRanks
from tests.train.tiny_run import losses, master_weights, records, train, write_run

LR = 0.01
TRUNK = {"kind": "infinite", "warmup_steps": 1, "cooldown_steps": 2, "cooldown_shape": "linear", "constant_factor": 0.5, "decay_steps": 0}
INFINITE = {"schedule": {**TRUNK, "min_factor": 0.1}, "checkpoint": {"every": 3, "keep_last": 9}, "train__dtype": "float64"}


def rates(folder: Path) -> dict[int, float]:
    return {record["step"]: record["lr"] / LR for record in records(folder / "run", "train")}


def events(folder: Path, name: str) -> list[dict]:
    return [event for event in records(folder / "run", "event") if event["event"] == name]


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "run" / "checkpoints" / f"step_{step:08d}"


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.fixture(scope="module")
def trunk(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps of an infinite schedule without decay; constant from step 3 on."""
    folder = tmp_path_factory.mktemp("trunk")
    run_ranks(2, train, write_run(folder, **INFINITE))
    return folder


def branch(run_ranks: RunRanks, trunk: Path, folder: Path, *overrides: str) -> None:
    """Run a branch of the trunk's step 3 in ``folder``/run."""
    where = [f"run_dir={folder / 'run'}", f"checkpoint.branch_from={checkpoint(trunk, 3)}"]
    run_ranks(2, train, trunk / "config.yaml", [*where, *overrides])


def test_branches_of_the_constant_phase_decay_each_for_themselves(run_ranks: RunRanks, trunk: Path, tmp_path: Path) -> None:
    assert rates(trunk) == pytest.approx({1: 1.0, 2: 0.75, **dict.fromkeys(range(3, 9), 0.5)}, rel=1e-12)
    annealed = {}
    for steps, expected in ((5, {4: 0.3, 5: 0.1}), (7, {4: 0.5, 5: 0.5, 6: 0.3, 7: 0.1})):
        folder = tmp_path / str(steps)
        branch(run_ranks, trunk, folder, f"train.steps={steps}", "schedule.decay_steps=2")
        assert rates(folder) == pytest.approx(expected, rel=1e-12)
        assert events(folder, "override")[0]["changes"] == {"schedule.decay_steps": [0, 2], "train.steps": [8, steps]}
        annealed[steps] = losses(folder / "run")
    assert annealed[5][4] == annealed[7][4] == losses(trunk / "run")[4], "the rate acts first on the loss of the step after"
    assert annealed[7][5] == losses(trunk / "run")[5] != annealed[5][5]


def test_a_branch_that_changes_nothing_is_the_trunk_bit_for_bit_and_resumes_from_itself(
    run_ranks: RunRanks, trunk: Path, tmp_path: Path
) -> None:
    branch(run_ranks, trunk, tmp_path)
    expected = {step: loss for step, loss in losses(trunk / "run").items() if step > 3}
    assert losses(tmp_path / "run") == expected
    assert same(master_weights(checkpoint(tmp_path, 8)), master_weights(checkpoint(trunk, 8)))
    start = records(tmp_path / "run", "start")[0]
    assert (start["step"], start["branched_from"]) == (3, str(checkpoint(trunk, 3))) and not events(tmp_path, "override")
    shutil.copy(trunk / "config.yaml", tmp_path / "run" / "config.yaml")
    run = read_run(tmp_path / "run")
    assert run.evals[0].step == 3 and run.train[0].tokens > run.evals[0].tokens > 0

    shutil.rmtree(checkpoint(tmp_path, 8))
    (tmp_path / "run/checkpoints/latest").write_text("step_00000006\n", "utf-8")
    branch(run_ranks, trunk, tmp_path)
    starts = [(record["step"], record["branched_from"]) for record in records(tmp_path / "run", "start")]
    assert starts == [(3, str(checkpoint(trunk, 3))), (6, None)]
    assert losses(tmp_path / "run") == expected


def test_a_branch_needs_steps_of_its_own(run_ranks: RunRanks, trunk: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"train\.steps: 3; accepted: more than the 3 steps of .*step_00000003") as error:
        branch(run_ranks, trunk, tmp_path, "train.steps=3")
    assert ConfigError.__name__ in str(error.value) or isinstance(error.value, ConfigError)


def test_a_finished_run_goes_on_with_a_second_warm_up_and_decay(run_ranks: RunRanks, tmp_path: Path) -> None:
    config = write_run(tmp_path, train__steps=4, schedule={"warmup_steps": 2, "min_factor": 0.2})
    run_ranks(1, train, config)
    longer = ["train.steps=8", "schedule.decay_ends=[4]", "schedule.rewarm_steps=2"]
    run_ranks(1, train, config, longer)
    period = {1: 0.5, 2: 1.0, 3: 0.6, 4: 0.2}
    assert rates(tmp_path) == pytest.approx({**period, 5: 0.6, 6: 1.0, 7: 0.6, 8: 0.2}, rel=1e-12)
    changes = {"schedule.decay_ends": [[], [4]], "schedule.rewarm_steps": [0, 2], "train.steps": [4, 8]}
    assert [(event["step"], event["changes"]) for event in events(tmp_path, "override")] == [(4, changes)]
    run_ranks(1, train, write_run(tmp_path / "whole", schedule={"warmup_steps": 2, "min_factor": 0.2}), longer)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole" / "run"), "as if it had been planned so from the start"


@pytest.fixture(scope="module", params=["whole_tensor", "zero2"])
def half_way(request: pytest.FixtureRequest, run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of a run on two ranks at a constant rate."""
    folder = tmp_path_factory.mktemp("half_way")
    config = write_run(folder, schedule={"kind": "constant"}, optimizer={"lr": LR, "sharding": request.param})
    run_ranks(2, train, config, ["train.steps=3"])
    return folder


def go_on(run_ranks: RunRanks, half_way: Path, folder: Path, *overrides: str) -> dict[str, torch.Tensor]:
    """Masters after one more step of a copy of the run."""
    shutil.copytree(half_way, folder)
    run_ranks(2, train, folder / "config.yaml", ["train.steps=4", f"run_dir={folder / 'run'}", *overrides])
    return {name: value.double() for name, value in master_weights(checkpoint(folder, 4)).items() if name.endswith("|master")}


def test_an_override_acts_from_the_next_step_on_and_is_told(
    run_ranks: RunRanks, half_way: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {name: value.double() for name, value in master_weights(checkpoint(half_way, 3)).items() if name.endswith("|master")}
    plain = go_on(run_ranks, half_way, tmp_path / "plain")
    assert events(tmp_path / "plain", "override")[0]["changes"] == {"train.steps": [3, 4]}
    assert not same(plain, before)

    stands = go_on(run_ranks, half_way, tmp_path / "stands", "optimizer.lr=0")
    assert same(stands, before)
    assert rates(tmp_path / "stands") == {1: 1.0, 2: 1.0, 3: 1.0, 4: 0.0}
    changes = {"optimizer.lr": [LR, 0.0], "train.steps": [3, 4]}
    assert [(event["step"], event["changes"]) for event in events(tmp_path / "stands", "override")] == [(3, changes)]

    assert "changed          optimizer.lr 0.01 -> 0.0; train.steps 3 -> 4\n" in capfd.readouterr().out

    decayed = go_on(run_ranks, half_way, tmp_path / "decayed", "optimizer.weight_decay=0.6")
    for name, value in before.items():
        expected = -LR * 0.5 * value if value.ndim == 2 else torch.zeros_like(value)
        torch.testing.assert_close(decayed[name] - plain[name], expected, rtol=0, atol=3e-7)
    assert max(float((decayed[name] - plain[name]).abs().max()) for name in before) > 1e-4
