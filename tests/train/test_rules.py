"""Whole runs with rules beside AdamW: what is printed and counted, resumed bit for bit, on other grids, and with another rule."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config import RunConfig, load_config
from megatron_ext.errors import ConfigError
from megatron_ext.optim.muon import Muon
from megatron_ext.parallel.world import World
from megatron_ext.train.build import prepare
from tests.distributed import RankError, RunRanks
from tests.train.tiny_run import losses, master_weights, records, train, write_run

OPTIONS: dict[str, Any] = {
    "train__dtype": "float64",
    "train__check_replicas_every": 1,
    "checkpoint__every": 2,
    "optimizer__lr": 0.01,
    "optimizer__eps": 1e-4,
    "schedule__kind": "constant",
}
MATRICES = 2 * 7


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "run" / "checkpoints" / f"step_{step:08d}"


@pytest.mark.parametrize("rule", ["normuon", "adamp"])
def test_a_run_goes_on_across_grids(run_ranks: RunRanks, tmp_path: Path, rule: str) -> None:
    rules = [f"optimizer.rule={rule}", "optimizer.adamp.delta=1.0", "optimizer.muon.split_heads=true"]
    config, stayed = write_run(tmp_path, **OPTIONS), write_run(tmp_path / "stayed", **OPTIONS)
    grids = [(2, ["parallel.tp=2"]), (4, ["parallel.pp=2"]), (4, ["parallel.tp=4"]), (1, [])]
    for leg, (ranks, grid) in enumerate(grids, start=1):
        run_ranks(ranks, train, config, [*rules, *grid, f"train.steps={2 * leg}"])
    run_ranks(1, train, stayed, rules)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "stayed" / "run"), rel=1e-9)
    seen, expected = master_weights(checkpoint(tmp_path, 8)), master_weights(checkpoint(tmp_path / "stayed", 8))
    assert seen.keys() == expected.keys()
    state = {"normuon": {"momentum_buffer", "second_moment"}, "adamp": {"exp_avg", "exp_avg_sq"}}[rule]
    assert {key.split("|")[1] for key in seen if "q_proj" in key} == state | {"master"}
    for name, value in expected.items():
        assert (seen[name] - value).abs().max() <= 1e-8 * value.abs().max(), name


def test_a_run_resumes_to_the_bit_and_counts(run_ranks: RunRanks, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    options = {**OPTIONS, "optimizer__rule": "muon", "optimizer__muon": {"lr": 0.02}}
    stayed, stopped = write_run(tmp_path / "stayed", **options), write_run(tmp_path / "stopped", **options)
    run_ranks(2, train, stayed)
    for steps in (4, 8):
        run_ranks(2, train, stopped, [f"train.steps={steps}"])
    assert losses(tmp_path / "stayed" / "run") == losses(tmp_path / "stopped" / "run")
    (last, *_) = records(tmp_path / "stayed" / "run", "train")[-1:]
    assert last["orthogonalizations"] == MATRICES
    assert last["lr"] == 0.01 and last["lr_by_rule"] == {"muon": 0.02}
    printed = capfd.readouterr().out
    assert re.search(r"muon +14 tensors, 15,360 parameters: model\.layers\.\*\.self_attn\.q_proj\.weight", printed)
    assert re.search(r"adamw +7 tensors, 4,256 parameters: model\.embed_tokens\.weight", printed)
    assert not [event for event in records(tmp_path / "stopped" / "run", "event") if event["event"] == "state_change"]


def test_changing_the_rule_says_what_begins_anew(run_ranks: RunRanks, tmp_path: Path) -> None:
    config = write_run(tmp_path, **OPTIONS)
    for steps, rule in ((2, "adamw"), (4, "muon"), (6, "normuon"), (8, "adamp")):
        run_ranks(2, train, config, [f"train.steps={steps}", f"optimizer.rule={rule}"])
    events = [event for event in records(tmp_path / "run", "event") if event["event"] == "state_change"]
    assert [(event["step"], event["changes"]) for event in events] == [
        (2, ["muon: exp_avg, exp_avg_sq, step of 14 parameters dropped", "muon: momentum_buffer of 14 parameters begins at zero"]),
        (4, ["normuon: second_moment of 14 parameters begins at zero"]),
        (
            6,
            [
                "adamp: momentum_buffer, second_moment of 14 parameters dropped",
                "adamp: exp_avg, exp_avg_sq, step of 14 parameters begins at zero",
            ],
        ),
    ]
    seen = master_weights(checkpoint(tmp_path, 8))
    assert all(value.isfinite().all() for value in seen.values())


def without_orthogonalization(world: World, config: str) -> None:
    """A run whose Muon does nothing."""
    original = Muon.step
    Muon.step = lambda self, closure=None: None
    try:
        train(world, Path(config))
    finally:
        Muon.step = original


def test_a_step_that_orthogonalizes_nothing_is_an_error(run_ranks: RunRanks, tmp_path: Path) -> None:
    config = write_run(tmp_path, **OPTIONS, optimizer__rule="muon")
    with pytest.raises(RankError, match="step 1: .* no matrix was orthogonalized"):
        run_ranks(1, without_orthogonalization, str(config))


def test_steps_do_not_depend_on_the_number_of_packs(run_ranks: RunRanks, tmp_path: Path) -> None:
    """One pack, and many that accumulate."""
    found = {}
    for tokens in (256, 32):
        run_ranks(1, train, write_run(tmp_path / str(tokens), **OPTIONS, optimizer__rule="muon", planning__tokens_per_pack=tokens))
        found[tokens] = losses(tmp_path / str(tokens) / "run")
    assert found[256] == pytest.approx(found[32], rel=1e-9)


def loaded(tmp_path: Path, *overrides: str) -> RunConfig:
    return load_config(write_run(tmp_path), list(overrides))


def test_routes_are_refused_before_any_rank_speaks(tmp_path: Path) -> None:
    config = loaded(tmp_path, "optimizer.rule=muon", "optimizer.routes={'*.nothing': adamw}")
    with pytest.raises(ConfigError, match="fits no parameter"):
        prepare(config)


def test_zero_goes_on_only_with_the_state_of_adamw(run_ranks: RunRanks, tmp_path: Path) -> None:
    config = write_run(tmp_path, **{**OPTIONS, "train__dtype": "float32"})
    run_ranks(1, train, config, ["train.steps=2", "optimizer.rule=muon"])
    with pytest.raises(RankError, match="q_proj.weight: the checkpoint has no exp_avg, exp_avg_sq, step, because another rule"):
        run_ranks(1, train, config, ["optimizer.sharding=zero1"])


def test_bfloat16_keeps_momentum_in_float32(run_ranks: RunRanks, tmp_path: Path) -> None:
    config = write_run(tmp_path, **{**OPTIONS, "train__dtype": "bfloat16", "optimizer__rule": "muon", "train__steps": 2})
    run_ranks(2, train, config, ["parallel.tp=2"])
    state = master_weights(checkpoint(tmp_path, 2))
    assert {value.dtype for value in state.values()} == {torch.float32}


CLIPPED = {**OPTIONS, "optimizer__rule": "muon", "optimizer__qk_clip": 0.02, "model__init_std": 0.2}
GRIDS = [
    (2, ["parallel.tp=2"]),
    (4, ["parallel.tp=4", "train.activation_checkpointing=full"]),
    (2, ["parallel.pp=2"]),
    (2, ["planning.policy=static", "planning.degree=2"]),
]


@pytest.fixture(scope="module")
def clipped(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Steps of one process."""
    folder = tmp_path_factory.mktemp("clipped")
    run_ranks(1, train, write_run(folder, **CLIPPED))
    return records(folder / "run", "train")


@pytest.mark.parametrize(("ranks", "grid"), GRIDS, ids=["tp2", "tp4", "pp2", "block2"])
def test_qk_clip_is_that_of_one_process(
    run_ranks: RunRanks, tmp_path: Path, clipped: list[dict[str, Any]], ranks: int, grid: list[str]
) -> None:
    run_ranks(ranks, train, write_run(tmp_path, **CLIPPED), grid)
    for mine, expected in zip(records(tmp_path / "run", "train"), clipped, strict=True):
        assert [mine[key] for key in ("loss", "max_logit")] == pytest.approx([expected[key] for key in ("loss", "max_logit")], rel=1e-6)
        assert mine["clipped_heads"] == expected["clipped_heads"]


def test_qk_clip_bounds_the_logits(run_ranks: RunRanks, tmp_path: Path, clipped: list[dict[str, Any]]) -> None:
    run_ranks(1, train, write_run(tmp_path, **{**CLIPPED, "optimizer__qk_clip": 1e9}))
    free = records(tmp_path / "run", "train")
    assert clipped[0]["max_logit"] == free[0]["max_logit"] > 0.1 and clipped[0]["clipped_heads"] > 0
    assert {record["clipped_heads"] for record in free} == {0}
    assert clipped[-1]["max_logit"] < 0.5 * free[-1]["max_logit"]
    assert clipped[-1]["loss"] != free[-1]["loss"]


def test_qk_clip_is_refused_where_norms_bound_the_logits(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.qk_clip is 100\.0; accepted is null with model\.qk_norm"):
        prepare(loaded(tmp_path, "optimizer.qk_clip=100.0", "model.qk_norm=true"))
