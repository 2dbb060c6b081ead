"""Whole runs that save memory: the same losses on every grid, packs that leave nothing behind, and what is refused."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config import load_config
from megatron_ext.data.batch import PackedBatch
from megatron_ext.errors import ConfigError
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.model.mlp import set_tile
from megatron_ext.optim.options import OptimizerOptions
from megatron_ext.parallel.device import HostTransfer
from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.pipeline import stages
from megatron_ext.parallel.world import World
from megatron_ext.train.build import build_optimizer
from megatron_ext.train.engine import owner_engine
from tests.distributed import RunRanks
from tests.peak_memory import peak_bytes
from tests.train.tiny_run import losses, train, write_run

TILES = {"train__mlp_tile_tokens": 5}
OFFLOAD = {"train__activation_checkpointing": "full", "train__offload_activations": True}
SHARED = {"planning__policy": "adaptive", "planning__tokens_per_pack": 16}
STAGES = {"parallel__pp": 2, "train__activation_checkpointing": "selective"}


@pytest.fixture(scope="module")
def alone(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of a run on one rank that saves nothing, in float64."""
    folder = tmp_path_factory.mktemp("alone")
    run_ranks(1, train, write_run(folder, train__dtype="float64"))
    return losses(folder / "run")


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [(1, OFFLOAD), (4, SHARED | OFFLOAD | {"parallel__tp": 2}), (4, SHARED | OFFLOAD | STAGES)],
    ids=["alone", "shared-tp2", "shared-pp2"],
)
def test_losses_are_those_of_one_rank_that_saves_nothing(
    run_ranks: RunRanks, tmp_path: Path, alone: dict[int, float], ranks: int, changes: dict[str, Any]
) -> None:
    run_ranks(ranks, train, write_run(tmp_path, train__dtype="float64", **TILES, **changes))
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-10, abs=0)


def test_offloading_changes_no_bit_of_a_run(run_ranks: RunRanks, tmp_path: Path) -> None:
    for name, keys in (("kept", []), ("offloaded", ["train.offload_activations=true"])):
        run_ranks(2, train, write_run(tmp_path / name, **STAGES), keys)
    assert losses(tmp_path / "kept/run") == losses(tmp_path / "offloaded/run")


def test_zero_that_divides_parameters(run_ranks: RunRanks, tmp_path: Path) -> None:
    run_ranks(2, train, write_run(tmp_path, optimizer__sharding="zero3", optimizer__eps=0.01, **TILES, **OFFLOAD))
    run_ranks(1, train, write_run(tmp_path / "plain", optimizer__eps=0.01))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain/run"), rel=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["train.offload_activations=true"], "false with activation_checkpointing none"),
        (["train.mlp_tile_tokens=0"], "at least 1, or null"),
        (["train.mlp_tile_tokens=64", "precision.recipe=mxfp8"], "null with precision.recipe mxfp8"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, keys: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write_run(tmp_path), keys)


MODEL = ModelConfig(64, 16, 48, 4, 4, 2, 4, 512)
TOKENS = 384


def pack_of(seed: int) -> PackedBatch:
    tokens = torch.randint(MODEL.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(seed))
    boundaries = torch.tensor([0, TOKENS], dtype=torch.int32)
    return PackedBatch(tokens, tokens.roll(-1), torch.arange(TOKENS), boundaries, torch.ones(TOKENS), torch.zeros_like(tokens), TOKENS)


def peaks_of_steps(world: World, recompute: str, offload: bool) -> list[int]:
    """Most bytes of a step of 3, and of one of 9 packs, after one that makes what every step keeps. Nothing is collected meanwhile."""
    grid = Grid(world, GridShape(world.size, 1, 1))
    model = GPT(MODEL, "sdpa", recompute, stage=stages([4] if world.size == 1 else [2, 2])[grid.stage])
    model.reset_parameters(0)
    set_tile(model, 32 if offload else None)
    model.offload = HostTransfer(world.device) if offload else None
    settings = {
        "train_batch_size": 1,
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": world.size > 1,
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        "gradient_clipping": 0.0,
        "steps_per_print": 2**62,
    }
    engine = owner_engine(model, build_optimizer(model, OptimizerOptions(lr=0.0), grid), grid, settings, 1)
    packs = [pack_of(seed) for seed in range(9)]

    def step(count: int) -> None:
        engine.step(packs[:count], count * TOKENS, torch.zeros(0, dtype=torch.float64))

    step(3)
    gc.collect()
    gc.disable()
    return [peak_bytes(lambda count=count: step(count)) for count in (3, 9)]


@pytest.mark.parametrize(("recompute", "offload"), [("none", False), ("selective", False), ("full", True)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_packs_leave_nothing_behind(run_ranks: RunRanks, ranks: int, recompute: str, offload: bool) -> None:
    for few, many in run_ranks(ranks, peaks_of_steps, recompute, offload):
        stream = TOKENS * MODEL.hidden_size * 4
        assert few > 10 * stream, "a pack is seen"
        assert many - few < stream / 2
