"""Whole runs through stages of data: resumed in the middle of each, on the same ranks and on others, with plans made ahead."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config import load_config
from megatron_ext.errors import ConfigError
from megatron_ext.train.build import prepare
from megatron_ext.train.dry_run import dry_run
from tests.distributed import RunRanks
from tests.train.test_trainer import CHECKPOINTS, drop_after
from tests.train.tiny_run import losses, random_documents, records, train, write_corpus, write_run

STAGES = [
    {"tokens": 600, "sequence_length": 16},
    {"share": 0.35, "sequence_length": 64, "weights": {"code": 0}},
    {"sequence_length": 128, "weights": {"prose": 1, "code": 9}, "replay_share": 0.5},
]
"""Of a run of 10 steps of 256 tokens: they begin at 0 and 600 tokens and after 5 steps, of which 2.34 and 3.5 are theirs."""


def staged(folder: Path, **changes: Any) -> Path:
    """A run through three stages that replays a third corpus, less and less."""
    folder.mkdir(parents=True, exist_ok=True)
    old = {"name": "old", "path": write_corpus(folder / "old", random_documents(40, 200, seed=5))}
    replay = {"share": 0.6, "sources": [old], "decay": {"to": 0.1, "tokens": 1200, "shape": "cosine"}}
    common = {"data__replay": replay, "data__stages": STAGES, "train__steps": 10, "checkpoint__every": 1, "checkpoint__keep_last": 20}
    return write_run(folder, **{**common, **changes})


@pytest.fixture(scope="module")
def straight(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that was never interrupted, with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("staged")
    run_ranks(2, train, staged(folder, train__dtype="float64"))
    return folder


def resumed(run_ranks: RunRanks, straight: Path, folder: Path, step: int, ranks: int, overrides: Sequence[str] = ()) -> Path:
    """The straight run, continued from ``step`` on."""
    config = staged(folder, train__dtype="float64")
    shutil.copytree(straight / "run", folder / "run")
    drop_after(folder, step)
    run_ranks(ranks, train, config, list(overrides))
    return folder / "run"


def data_state(run: Path, step: int) -> dict[str, Any]:
    return json.loads((run.parent / CHECKPOINTS / f"step_{step:08d}" / "trainer_state.json").read_text("utf-8"))["data"]


def test_stages_begin_where_they_should(straight: Path) -> None:
    steps = records(straight / "run", "train")
    events = [record for record in records(straight / "run", "event") if record["event"] == "stage"]
    assert [(event["stage"], event["sequence_length"]) for event in events] == [(1, 64), (2, 128)]
    second, third = (event["step"] for event in events)
    before = {record["step"]: record["tokens"] for record in steps}
    assert before[second - 1] >= 600 > before[second - 2], "the first step that begins there or later"
    assert third == 6 and before[third - 1] < 5 * 256, "the first behind 5 steps, which were not full"
    code = {record["step"]: record["tokens_by_source"]["code"] for record in steps}
    assert code[second - 1] == code[third - 1] < code[10], "the second stage leaves code out"
    assert all(int(length) <= 16 for record in steps[: second - 1] for length in record["length_histogram"])
    assert max(int(length) for record in steps[third - 1 :] for length in record["length_histogram"]) > 64


@pytest.mark.parametrize("step", [2, 5, 9])
def test_resume_in_the_middle_of_each_stage_is_bit_exact(run_ranks: RunRanks, straight: Path, tmp_path: Path, step: int) -> None:
    run = resumed(run_ranks, straight, tmp_path, step, ranks=2)
    assert losses(run) == losses(straight / "run")
    assert data_state(run, 10) == data_state(straight / "run", 10)
    told = [[(r["step"], r["stage"]) for r in records(folder, "event") if r["event"] == "stage"] for folder in (run, straight / "run")]
    assert told[0] == told[1], "each stage is told once"


@pytest.mark.parametrize(
    ("step", "ranks", "grid"),
    [(2, 1, []), (5, 2, ["parallel.tp=2"]), (9, 3, []), (5, 2, ["parallel.pp=2"])],
    ids=["one", "tp", "three", "pp"],
)
def test_resume_on_another_grid(run_ranks: RunRanks, straight: Path, tmp_path: Path, step: int, ranks: int, grid: list[str]) -> None:
    run = resumed(run_ranks, straight, tmp_path, step, ranks, grid)
    assert losses(run) == pytest.approx(losses(straight / "run"), rel=1e-10, abs=0)
    assert data_state(run, 10) == data_state(straight / "run", 10)


def test_plans_made_ahead_see_the_stages(run_ranks: RunRanks, straight: Path, tmp_path: Path) -> None:
    run_ranks(2, train, staged(tmp_path, train__dtype="float64", planning={"policy": "adaptive", "tokens_per_pack": 64, "ahead": 3}))
    assert losses(tmp_path / "run") == pytest.approx(losses(straight / "run"), rel=1e-10, abs=0)
    degrees = {degree for record in records(tmp_path / "run", "train") for degree in record["tokens_by_degree"]}
    assert degrees == {"1", "2"}, "the long documents of the last stage are shared"


def test_changed_stages_are_refused(run_ranks: RunRanks, straight: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="a stage that has begun"):
        resumed(run_ranks, straight, tmp_path, 5, 1, ["data.stages.0.tokens=601"])


def test_a_pack_holds_the_longest_piece_of_all_stages(tmp_path: Path) -> None:
    config = staged(tmp_path)
    setup = prepare(load_config(config))
    assert setup.tokens_per_pack == setup.model.max_position == 128
    assert max(len(piece) for each in setup.validation for piece in each.pieces) > 64
    with pytest.raises(ConfigError, match=r"planning\.tokens_per_pack: 64; accepted: at least 128"):
        load_config(config, ["planning.tokens_per_pack=64"])
    with pytest.raises(ConfigError, match=r"data\.tokens_per_step: 100; accepted: at least sequence_length \(128\)"):
        load_config(config, ["data.tokens_per_step=100"])


def test_the_stages_are_told_before_the_run(tmp_path: Path) -> None:
    lines = dry_run(load_config(staged(tmp_path))).splitlines()
    first, second, third = lines[lines.index("stages") + 1 :]
    assert "from 0 tokens: sequences of 16, prose" in first
    assert "from 600 tokens: sequences of 64, prose" in second and "code 0.0%" in second
    assert third.strip() == "from step 6: sequences of 128, prose 5.0%, code 45.0%, old 50.0%"
    short = dry_run(load_config(staged(tmp_path), ["train.steps=2"])).splitlines()
    assert short[-1].endswith("which the run does not reach")


def test_stages_that_never_began_are_told_at_the_end(run_ranks: RunRanks, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_ranks(1, train, staged(tmp_path, data__stages=[*STAGES[:1], {"tokens": 900}, STAGES[2]]), ["train.steps=4"])
    (event,) = [record for record in records(tmp_path / "run", "event") if record["event"] == "stage_not_reached"]
    assert (event["stage"], event["begin"], event["begin_step"], event["step"]) == (2, 1500, None, 4)
    assert "warning: stage 2 of the data, from 1,500 tokens on, never began" in " ".join(capfd.readouterr().out.split())


def test_repeated_data_are_told_once_for_each_source(run_ranks: RunRanks, tmp_path: Path) -> None:
    run_ranks(1, train, staged(tmp_path, data__repeats_warned_at=0.4))
    told = {record["source"]: record for record in records(tmp_path / "run", "event") if record["event"] == "repeated_data"}
    epochs = {record["step"]: record["epochs"] for record in records(tmp_path / "run", "train")}
    assert set(told) == {name for name, seen in epochs[10].items() if seen > 0.4} and "prose" in told
    for name, record in told.items():
        assert epochs[record["step"] - 1][name] <= 0.4 < epochs[record["step"]][name] == record["epochs"]
    drop_after(tmp_path, 9)
    run_ranks(1, train, tmp_path / "config.yaml")
    assert len([record for record in records(tmp_path / "run", "event") if record["event"] == "repeated_data"]) == len(told)
