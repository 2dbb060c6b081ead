"""Whole runs in low precision: they learn, resume and recompute to the bit, switch late, and depend on plans no more than they say."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint.manifest import seal
from megatron_ext.config import load_config
from megatron_ext.errors import ConfigError
from megatron_ext.train.build import prepare
from tests.distributed import RankError, RunRanks
from tests.train.tiny_run import losses, master_weights, records, train, write_run

ALL_LAYERS = {"high_precision_first": 0, "high_precision_last": 0}
NVFP4 = {"recipe": "nvfp4", **ALL_LAYERS}


def run(run_ranks: RunRanks, folder: Path, *overrides: str, ranks: int = 1, precision: dict[str, Any] | None = None) -> dict[int, float]:
    """Losses of a run of a small bfloat16 model."""
    options = {
        "train__dtype": "bfloat16",
        "train__steps": 6,
        "checkpoint__every": 2,
        "checkpoint__keep_last": 9,
        "schedule__kind": "constant",
    }
    run_ranks(ranks, train, write_run(folder, precision=precision or NVFP4, **options), overrides)
    return losses(folder / "run")


def weights(folder: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return master_weights(folder / "run" / "checkpoints" / f"step_{step:08d}")


def same_weights(first: Path, second: Path) -> bool:
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def plain(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """A run that quantizes nothing."""
    return run(run_ranks, tmp_path_factory.mktemp("plain"), precision={"recipe": "bf16"})


@pytest.fixture(scope="module")
def straight(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An nvfp4 run of six steps, never interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    run(run_ranks, folder)
    return folder


@pytest.mark.parametrize("recipe", ["fp8_tensorwise", "fp8_rowwise", "fp8_blockwise", "mxfp8", "nvfp4", "mxfp4"])
def test_a_run_learns_near_bf16(run_ranks: RunRanks, tmp_path: Path, plain: dict[int, float], recipe: str) -> None:
    found = run(run_ranks, tmp_path, precision={"recipe": recipe, **ALL_LAYERS})
    assert found[6] < found[1] - 0.3 and found != plain
    assert max(abs(found[step] - plain[step]) for step in plain) < 0.03


def test_a_run_says_what_is_quantized_and_keeps_the_first_and_last_blocks(
    run_ranks: RunRanks, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    config = write_run(tmp_path, train__steps=2, train__dtype="bfloat16", precision={"recipe": "nvfp4"}, model__num_layers=4)
    run_ranks(1, train, config)
    printed = capfd.readouterr().out
    assert re.search(r"precision +nvfp4, .*: 14 of 28 linears of blocks; not in the first 1 and the last 1 of 4 blocks", printed)
    assert re.search(r"products +emulated \(auto: emulated on cpu\)", printed)


def cut_back(straight: Path, target: Path, step: int) -> Path:
    """A copy of the straight run as it was after ``step``."""
    shutil.copytree(straight, target)
    checkpoints = target / "run" / "checkpoints"
    for path in checkpoints.glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    (checkpoints / "latest").write_text(f"step_{step:08d}\n", "utf-8")
    return checkpoints / f"step_{step:08d}"


def test_resume_is_bit_exact_with_stochastic_rounding(run_ranks: RunRanks, tmp_path: Path, straight: Path) -> None:
    cut_back(straight, tmp_path / "copy", 2)
    assert run(run_ranks, tmp_path / "copy") == losses(straight / "run")
    assert same_weights(tmp_path / "copy", straight)


@pytest.mark.parametrize("changed", ["signs", "seed"])
def test_resume_goes_on_with_the_saved_signs_and_seed(run_ranks: RunRanks, tmp_path: Path, straight: Path, changed: str) -> None:
    """Both come from the checkpoint, and the comparison notices each."""
    path = cut_back(straight, tmp_path / "copy", 4) / "trainer_state.json"
    state = json.loads(path.read_text("utf-8"))
    saved = state["precision"]
    assert len(saved["signs"]) == 32 and saved["seed"] == 7
    saved[changed] = saved["signs"][::-1] if changed == "signs" else 8
    path.write_text(json.dumps(seal(state)), "utf-8")
    found, expected = run(run_ranks, tmp_path / "copy"), losses(straight / "run")
    assert found[5] == expected[5], "the forward pass has no random numbers"
    assert found[6] != expected[6]


@pytest.mark.parametrize(
    "change", ["train.activation_checkpointing=full", "train.activation_checkpointing=selective", "precision.stash=false"]
)
def test_computing_again_or_keeping_more_changes_no_bit(run_ranks: RunRanks, tmp_path: Path, straight: Path, change: str) -> None:
    assert run(run_ranks, tmp_path, change) == losses(straight / "run")
    assert same_weights(tmp_path, straight)


@pytest.mark.parametrize("forward_only", [False, True])
def test_the_late_switch_comes_with_the_step_after_its_tokens(
    run_ranks: RunRanks, tmp_path: Path, straight: Path, forward_only: bool
) -> None:
    tokens = {record["step"]: record["tokens"] for record in records(straight / "run", "train")}
    keys = [f"precision.switch_at_tokens={tokens[3]}", f"precision.forward_only={str(forward_only).lower()}"]
    found, expected = run(run_ranks, tmp_path, *keys), losses(straight / "run")
    assert [found[step] == expected[step] for step in range(1, 7)] == [True] * 3 + [False] * 3
    events = [event for event in records(tmp_path / "run", "event") if event["event"] == "precision_switch"]
    assert [(event["step"], event["tokens"]) for event in events] == [(4, tokens[3])]
    if not forward_only:
        later = run(run_ranks, tmp_path / "later", f"precision.switch_at_tokens={tokens[3] + 1}")
        assert [later[step] == expected[step] for step in range(1, 7)] == [True] * 4 + [False] * 2


def distance(one: dict[int, float], other: dict[int, float]) -> float:
    return sum((one[step] - other[step]) ** 2 for step in one) ** 0.5


def test_packs_couple_tokens_by_less_than_quantization_moves_the_run(
    run_ranks: RunRanks, tmp_path: Path, plain: dict[int, float], straight: Path
) -> None:
    """What the options promise of plans, measured: scales of a tensor and blocks of tokens see the pack, and move losses a little."""
    expected = losses(straight / "run")
    moved = distance(expected, plain)
    cases = {
        "packs": (1, ["planning.tokens_per_pack=64"]),
        "sp2": (2, ["parallel.tp=2", "parallel.sequence_parallel_activations=true"]),
        "pp2": (2, ["parallel.pp=2"]),
        "degree2": (2, ["planning.policy=static", "planning.degree=2"]),
    }
    found = {name: distance(run(run_ranks, tmp_path / name, *keys, ranks=ranks), expected) for name, (ranks, keys) in cases.items()}
    print(
        "distance of losses from one process, in that of nvfp4 from bf16:", {name: round(each / moved, 3) for name, each in found.items()}
    )
    assert found["packs"] > 0, "packs couple tokens"
    assert max(found.values()) < 1.5 * moved, found


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["precision.recipe=nvfp4"], "precision.recipe is 'nvfp4', but in 2 blocks nothing is left to quantize"),
        (
            ["precision.recipe=mxfp8", "precision.high_precision_names=['*.wo.weight']"],
            "precision.high_precision_names: '*.wo.weight' fits no",
        ),
        (["precision.recipe=mxfp8", "train.dtype=float64"], "precision.recipe: 'mxfp8'; accepted: bf16 with train.dtype float64"),
        (["precision.recipe=nvfp5"], "precision.recipe: 'nvfp5'; accepted: bf16, fp8_tensorwise, fp8_rowwise"),
        (["precision.recipe=mxfp8", "precision.hadamard=true"], "precision.hadamard: true; accepted: null or false with mxfp8"),
    ],
)
def test_what_cannot_be_is_refused_before_any_rank_speaks(tmp_path: Path, keys: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(load_config(write_run(tmp_path), keys))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("backend", "accepted"),
    [("native", "auto, emulated, because"), ("transformer_engine", "auto, because TransformerEngine needs a CUDA device, not cpu")],
)
def test_products_are_refused_where_nothing_computes_them(run_ranks: RunRanks, tmp_path: Path, backend: str, accepted: str) -> None:
    with pytest.raises(RankError, match=f"precision.backend: '{backend}'; accepted with nvfp4 here: {accepted}"):
        run(run_ranks, tmp_path, f"precision.backend={backend}")


def test_codes_on_the_wire_change_a_run_a_little_and_are_told(run_ranks: RunRanks, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    shared = ("parallel.tp=2", "parallel.sequence_parallel_activations=true")
    plain = run(run_ranks, tmp_path / "plain", *shared, ranks=2, precision={"recipe": "bf16"})
    coded = run(run_ranks, tmp_path / "coded", *shared, ranks=2, precision={"communication": "mxfp8", "switch_at_tokens": 100})
    assert "communication" in capfd.readouterr().out
    assert coded[1] != plain[1] and coded == pytest.approx(plain, rel=5e-3)
