"""Statistics over tokens in real runs: the same on every grid, and kept in checkpoints."""

import shutil
from pathlib import Path

import pytest
import torch

from megatron_ext.config import load_config
from megatron_ext.errors import ConfigError
from megatron_ext.parallel.world import World
from megatron_ext.train.running_norms import RunningNormUpdate
from tests.distributed import RunRanks
from tests.train.tiny_run import losses, master_weights, train, write_run

FLOAT64 = ("train.dtype=float64", "train.steps=4", "checkpoint.every=2", "optimizer.clip_norm=0")
GRIDS = {
    "dp2": (2, []),
    "tp2": (2, ["parallel.tp=2", "parallel.sequence_parallel_activations=true", "train.activation_checkpointing=full"]),
    "shared": (2, ["planning.policy=static", "planning.degree=2", "planning.tokens_per_pack=16"]),
}


def run(run_ranks: RunRanks, folder: Path, name: str, kind: str, ranks: int, overrides: list[str]) -> Path:
    """Train; returns the run's directory."""
    placed = [f"model.norm={{kind: {kind}, placement: peri, embedding_norm: true}}", f"run_dir={folder / name}"]
    run_ranks(ranks, train, folder / "config.yaml", [*FLOAT64, *placed, *overrides])
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("running_norms")).parent


@pytest.fixture(scope="module")
def alone(run_ranks: RunRanks, folder: Path) -> dict[str, Path]:
    """Runs of one process, by kind of norm."""
    return {kind: run(run_ranks, folder, f"{kind}_alone", kind, 1, []) for kind in ("power", "unified")}


@pytest.mark.parametrize(("kind", "grid"), [("power", "dp2"), ("power", "tp2"), ("unified", "dp2"), ("unified", "shared")])
def test_losses_and_statistics_equal_those_of_one_process(
    run_ranks: RunRanks, folder: Path, alone: dict[str, Path], kind: str, grid: str
) -> None:
    expected = master_weights(alone[kind] / "checkpoints" / "step_00000004")
    square = expected["model.layers.1.post_feedforward_layernorm.running_square|master"]
    assert square.std() > 0 and not (square == 1).all()
    found = run(run_ranks, folder, f"{kind}_{grid}", kind, *GRIDS[grid])
    for step, loss in losses(alone[kind]).items():
        assert losses(found)[step] == pytest.approx(loss, rel=1e-10, abs=0)
    for name, value in master_weights(found / "checkpoints" / "step_00000004").items():
        if "running" in name and name.endswith("master"):
            assert (value - expected[name]).abs().max() <= 1e-10 * expected[name].abs().max(), name


def test_a_resumed_run_has_its_statistics(run_ranks: RunRanks, folder: Path, alone: dict[str, Path]) -> None:
    whole, saved = alone["power"], folder / "saved" / "step_00000002"
    shutil.copytree(whole / "checkpoints" / "step_00000002", saved)
    resumed = run(run_ranks, folder, "resumed", "power", 1, [f"checkpoint.resume={saved}"])
    assert losses(resumed) == {step: loss for step, loss in losses(whole).items() if step > 2}
    seen, expected = (master_weights(each / "checkpoints" / "step_00000004") for each in (resumed, whole))
    assert seen.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in seen.items())


def train_apart(world: World, config: Path, overrides: list[str]) -> None:
    """As ``train``, every rank counting its own tokens only."""
    original = RunningNormUpdate.prepare

    def prepare(self: RunningNormUpdate) -> None:
        self._groups = []
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunningNormUpdate, "prepare", prepare)
        train(world, config, overrides)


def test_ranks_that_count_only_their_tokens_are_seen(run_ranks: RunRanks, folder: Path, alone: dict[str, Path]) -> None:
    options = [*FLOAT64, "model.norm={kind: power, placement: peri, embedding_norm: true}", f"run_dir={folder / 'apart'}"]
    run_ranks(2, train_apart, folder / "config.yaml", options)
    assert abs(losses(folder / "apart")[4] / losses(alone["power"])[4] - 1) > 1e-6


def test_zero_is_refused(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    with pytest.raises(
        ConfigError, match="model.norm.kind: 'unified'; accepted: a kind without statistics of tokens with optimizer.sharding zero2"
    ):
        load_config(config, ["model.norm.kind=unified", "optimizer.sharding=zero2"])
