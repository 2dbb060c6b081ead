"""The recipes of examples/configs: valid, complete, laid out for the machines that they name."""

from pathlib import Path

import pytest

from megatron_ext.config import load_config, total_steps
from megatron_ext.train import dry_run
from tests.train.tiny_run import ROOT

CONFIGS = ROOT / "examples" / "configs"
CLUSTERS = {"llama3_8b_64k_cpt": (32, 80.0, 8_030_261_248), "qwen3_4b_32k_domain": (16, 80.0, 4_022_468_096)}
"""Ranks, GiB of each, and parameters of the model."""


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes name their files from there."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_says_how_it_is_started(path: Path) -> None:
    load_config(path)
    words = [line for line in path.read_text("utf-8").splitlines() if line.startswith("#")]
    assert words and any(path.name in line or "quickstart.sh" in line for line in words)


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_dry_run_fits_the_named_cluster(name: str) -> None:
    ranks, gib, parameters = CLUSTERS[name]
    text = (CONFIGS / f"{name}.yaml").read_text("utf-8")
    assert f"--dry-run --ranks {ranks} --gib {gib:g}" in text and f"{ranks} GPUs of {gib:g} GB" in text
    told = dry_run(load_config(CONFIGS / f"{name}.yaml"), ranks, gib)
    assert f"parameters       {parameters:,}" in " ".join(told.splitlines()[-40:]) and f"fits into {gib:g} GiB" in told
    assert "model.init_from: examples/models/" in told.split("not there yet")[1]


def test_the_long_recipe_trains_on_the_lengths_that_it_names() -> None:
    config = load_config(CONFIGS / "llama3_8b_64k_cpt.yaml")
    assert config.data.longest_sequence == config.model.max_position == 65536
    assert config.schedule.warmup_steps == round(0.1 * total_steps(config)), "a tenth of the run"
    long, short = sum(source.weight for source in config.data.sources), config.data.replay
    assert short is not None and short.share == pytest.approx(0.37) and long == 63, "the shares of ProLong"


def test_the_small_recipe_uses_what_the_large_ones_do() -> None:
    small, large = (load_config(CONFIGS / f"{name}.yaml") for name in ("cpu_long_context", "llama3_8b_64k_cpt"))
    assert small.planning.policy == large.planning.policy == "adaptive" and small.data.stages and large.data.stages
    assert small.train.mlp_tile_tokens and small.evaluation.needle and small.data.replay and small.model.rope
