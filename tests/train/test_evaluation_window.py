"""Runs whose evaluation sees the first and last tokens of documents: training as ever, the same evaluation on every grid."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config import load_config
from megatron_ext.errors import ConfigError
from megatron_ext.train.build import prepare, run_shape
from tests.distributed import RunRanks
from tests.train.tiny_run import losses, records, train, write_run

KEYS: dict[str, Any] = {
    "model__init_std": 0.2,
    "train__dtype": "float64",
    "train__steps": 1,
    "schedule__warmup_steps": 0,
    "checkpoint__every": None,
}
WINDOW = {"model__evaluation_window": {"local_tokens": 8, "global_tokens": 2}}
SHARED = {"planning__policy": "static", "planning__degree": 2, "planning__tokens_per_pack": 16}
GRIDS = {"alone": (1, {}), "pp": (2, {"parallel__pp": 2}), "tp": (2, {"parallel__tp": 2}), "ulysses": (2, SHARED)}


def evaluations(folder: Path) -> dict[tuple[str, int], float]:
    """Loss by source and step."""
    return {(each["source"], each["step"]): each["loss"] for each in records(folder / "run", "eval")}


def test_training_is_untouched_and_every_grid_evaluates_alike(
    run_ranks: RunRanks, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_ranks(1, train, write_run(tmp_path / "plain", **KEYS))
    for name, (ranks, changes) in GRIDS.items():
        run_ranks(ranks, train, write_run(tmp_path / name, **KEYS, **WINDOW, **changes))
    said = "first 2 and last 8 tokens of a document, distances up to 8\n"
    assert capfd.readouterr().out.count(said) == len(GRIDS)
    assert losses(tmp_path / "alone/run") == losses(tmp_path / "plain/run"), "to the bit"
    windowed, plain = evaluations(tmp_path / "alone"), evaluations(tmp_path / "plain")
    assert windowed.keys() == plain.keys() and all(abs(windowed[key] - plain[key]) > 1e-4 for key in plain)
    for name in GRIDS:
        assert evaluations(tmp_path / name) == pytest.approx(windowed, rel=1e-10, abs=0)
        assert losses(tmp_path / name / "run") == pytest.approx(losses(tmp_path / "plain/run"), rel=1e-10, abs=0)


def test_zero_evaluates_in_the_window(run_ranks: RunRanks, tmp_path: Path) -> None:
    keys = {**KEYS, "train__dtype": "float32"}
    run_ranks(2, train, write_run(tmp_path / "zero", **keys, **WINDOW, optimizer__sharding="zero3"))
    run_ranks(1, train, write_run(tmp_path / "alone", **keys, **WINDOW))
    assert evaluations(tmp_path / "zero") == pytest.approx(evaluations(tmp_path / "alone"), rel=2e-5, abs=0)


def test_rings_are_refused_by_name(tmp_path: Path) -> None:
    one_head = {"model__num_heads": 1, "model__num_kv_heads": 1, "planning__policy": "adaptive", "planning__largest_degree": 2}
    setup = prepare(load_config(write_run(tmp_path, **one_head, **WINDOW)))
    assert run_shape(setup.config, setup.model, 1).dp == 1
    with pytest.raises(ConfigError, match=r"model.evaluation_window is set with blocks of up to 2 ranks; accepted .* at most 1, the query"):
        run_shape(setup.config, setup.model, 2)
    without = prepare(load_config(write_run(tmp_path / "without", **one_head)))
    assert run_shape(without.config, without.model, 2).dp == 2
