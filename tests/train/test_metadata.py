"""Whole runs on documents with metadata and a cool-down without: equal on every grid and plan, and resumed on both sides of the change."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import RunRanks
from tests.train.test_trainer import drop_after
from tests.train.tiny_run import losses, random_documents, records, train, write_corpus, write_run


def described(folder: Path, **changes: Any) -> Path:
    """Six steps with metadata, then four without."""
    folder.mkdir(parents=True, exist_ok=True)
    documents, rows = random_documents(60, 90, seed=1), [row[:-1] for row in random_documents(60, 12, seed=2)]
    source = {"name": "web", "path": write_corpus(folder / "web", documents), "metadata": write_corpus(folder / "rows", rows)}
    common = {"data__sources": [source], "data__sequence_length": 64, "train__dtype": "float64", "train__steps": 10}
    stages = {"data__stages": [{"share": 0.55}, {"metadata": False}], "checkpoint__every": 1, "checkpoint__keep_last": 20}
    return write_run(folder, **{**common, **stages, **changes})


@pytest.fixture(scope="module")
def alone(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("metadata")
    run_ranks(1, train, described(folder))
    return folder


def test_shared_packs_divide_metadata_too(run_ranks: RunRanks, alone: Path, tmp_path: Path) -> None:
    run_ranks(2, train, described(tmp_path, planning={"policy": "static", "degree": 2, "tokens_per_pack": 32}))
    assert losses(tmp_path / "run") == pytest.approx(losses(alone / "run"), rel=1e-10, abs=0)


@pytest.mark.parametrize(("step", "ranks"), [(3, 1), (8, 1), (5, 2)])
def test_resume_before_and_after_the_change(run_ranks: RunRanks, alone: Path, tmp_path: Path, step: int, ranks: int) -> None:
    config = described(tmp_path)
    shutil.copytree(alone / "run", tmp_path / "run")
    drop_after(tmp_path, step)
    run_ranks(ranks, train, config)
    seen, expected = losses(tmp_path / "run"), losses(alone / "run")
    assert seen == (expected if ranks == 1 else pytest.approx(expected, rel=1e-10, abs=0))


def test_the_change_is_told_and_matters(run_ranks: RunRanks, alone: Path, tmp_path: Path) -> None:
    [event] = [record for record in records(alone / "run", "event") if record["event"] == "stage"]
    assert event["stage"] == 1
    run_ranks(1, train, described(tmp_path, data__stages=[{"share": 0.55}, {}]))
    seen, expected = losses(tmp_path / "run"), losses(alone / "run")
    assert [step for step in seen if seen[step] != expected[step]] == list(range(event["step"], 11)), "only the cool-down differs"
