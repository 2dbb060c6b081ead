"""Whole runs on decomposed documents: each step of one length, resumed within a cycle, on other ranks, with plans made ahead."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config import load_config
from megatron_ext.errors import ConfigError
from tests.distributed import RunRanks
from tests.train.test_trainer import drop_after
from tests.train.tiny_run import losses, records, train, write_run


def decomposed(folder: Path, **changes: Any) -> Path:
    """Twelve steps in two cycles of lengths that grow."""
    common = {"data__decomposition": {"smallest": 4, "cycle_tokens": 1536}, "data__sequence_length": 64, "train__steps": 12}
    saved = {"train__dtype": "float64", "checkpoint__every": 1, "checkpoint__keep_last": 20}
    return write_run(folder, **{**common, **saved, **changes})


@pytest.fixture(scope="module")
def alone(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decomposed")
    run_ranks(1, train, decomposed(folder))
    return folder


def test_each_step_has_one_length(alone: Path) -> None:
    lengths = [{int(length) for length in record["length_histogram"]} for record in records(alone / "run", "train")]
    whole = [min(each) for each in lengths if max(each) > 4]
    assert all(len(each) == 1 for each in lengths if max(each) > 4) and set(whole) == {8, 16, 32, 64}
    assert {1, 2, 4} >= set().union(*(each for each in lengths if max(each) <= 4))


@pytest.mark.parametrize(("step", "ranks"), [(2, 1), (8, 1), (5, 2)])
def test_resume_within_a_cycle(run_ranks: RunRanks, alone: Path, tmp_path: Path, step: int, ranks: int) -> None:
    config = decomposed(tmp_path)
    shutil.copytree(alone / "run", tmp_path / "run")
    drop_after(tmp_path, step)
    run_ranks(ranks, train, config)
    seen, expected = losses(tmp_path / "run"), losses(alone / "run")
    assert seen == (expected if ranks == 1 else pytest.approx(expected, rel=1e-10, abs=0))


def test_plans_made_ahead_follow_the_curriculum(run_ranks: RunRanks, alone: Path, tmp_path: Path) -> None:
    run_ranks(2, train, decomposed(tmp_path, planning={"policy": "adaptive", "tokens_per_pack": 64, "ahead": 2}))
    assert losses(tmp_path / "run") == pytest.approx(losses(alone / "run"), rel=1e-10, abs=0)


REFUSED = [
    ("data.sequence_length=48", "data.sequence_length: 48; accepted: a power of two with decomposition"),
    ("data.stages=[{sequence_length: 32}]", "data.stages: '1 stages'; accepted: none with decomposition"),
    (
        "data.replay={share: 0.5, run: r, decay: {to: 0, tokens: 5}}",
        "data.replay.decay: ReplayDecayOptions(to=0.0, tokens=5, shape='linear'); accepted: null with decomposition",
    ),
]


@pytest.mark.parametrize(("override", "message"), REFUSED)
def test_what_does_not_go_with_it_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(decomposed(tmp_path), [override])
    assert message in str(error.value)
