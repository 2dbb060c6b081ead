"""DeepSpeed's ZeRO stages under the same trainer: against one process, and in and out of checkpoints of other shardings."""

from pathlib import Path

import pytest
import torch

from megatron_ext.config import load_config
from megatron_ext.errors import ConfigError
from tests.distributed import RunRanks
from tests.train.tiny_run import losses, master_weights, train, write_run

STAGES = ["zero1", "zero2", "zero3"]


def last_checkpoint(folder: Path) -> Path:
    return sorted((folder / "run" / "checkpoints").glob("step_*"))[-1]


def run(run_ranks: RunRanks, folder: Path, sharding: str, ranks: int, *overrides: str, **changes: object) -> tuple[dict[int, float], dict]:
    """Losses, and the master weights and moments of the last checkpoint."""
    config = write_run(folder, **{"optimizer__sharding": sharding, "optimizer__eps": 0.01, **changes})
    run_ranks(ranks, train, config, overrides)
    return losses(folder / "run"), master_weights(last_checkpoint(folder))


@pytest.fixture(scope="module")
def alone(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, float], dict]:
    """The owner optimizer on one process."""
    return run(run_ranks, tmp_path_factory.mktemp("alone"), "whole_tensor", 1)


def largest_error(seen: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert seen.keys() == expected.keys()
    return max(float((seen[name].double() - value).abs().max() / value.abs().max().clamp(min=1e-30)) for name, value in expected.items())


@pytest.mark.parametrize("sharding", STAGES)
def test_losses_and_state_are_those_of_one_process(
    run_ranks: RunRanks, tmp_path: Path, alone: tuple[dict[int, float], dict], sharding: str
) -> None:
    seen, state = run(run_ranks, tmp_path, sharding, 2)
    assert seen == pytest.approx(alone[0], rel=1e-5)
    assert largest_error(state, alone[1]) < 1e-4


@pytest.mark.parametrize(("before", "after"), [("zero3", "whole_tensor"), ("whole_tensor", "zero2"), ("zero1", "zero3")])
def test_resumes_under_another_sharding_and_number_of_ranks(
    run_ranks: RunRanks, tmp_path: Path, alone: tuple[dict[int, float], dict], before: str, after: str
) -> None:
    config = write_run(tmp_path, optimizer__sharding=before, optimizer__eps=0.01, train__steps=8)
    run_ranks(2, train, config, ["train.steps=5", "schedule.kind=constant"])
    run_ranks(1, train, config, [f"optimizer.sharding={after}", "schedule.kind=constant"])
    straight, _ = run(run_ranks, tmp_path / "straight", "whole_tensor", 1, "schedule.kind=constant")
    assert losses(tmp_path / "run") == pytest.approx(straight, rel=1e-5)


@pytest.mark.parametrize("sharding", STAGES)
def test_the_checkpoint_loads_in_transformers(run_ranks: RunRanks, tmp_path: Path, sharding: str) -> None:
    from transformers import AutoModelForCausalLM

    _, state = run(run_ranks, tmp_path, sharding, 2, train__steps=2, train__dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(last_checkpoint(tmp_path), dtype=torch.bfloat16)
    masters = {key.split("|")[0]: value for key, value in state.items() if key.endswith("|master")}
    assert all(torch.equal(parameter, masters[name].bfloat16()) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(("key", "message"), [("parallel.tp=2", "tp 2 and pp 1"), ("train.dtype=float64", "keeps float32 masters")])
def test_what_zero_cannot_do_is_refused(tmp_path: Path, key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write_run(tmp_path), ["optimizer.sharding=zero1", key])
