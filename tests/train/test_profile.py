import gzip
import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_ext.config import load_config
from megatron_ext.errors import ConfigError
from megatron_ext.train.profile import StepProfile, check_ranks
from tests.distributed import RunRanks
from tests.grids import ALONE
from tests.train.tiny_run import losses, master_weights, train, write_run

PROFILE = {"steps": [2, 3], "ranks": [1]}


def test_traces_have_the_operators_and_change_no_number(run_ranks: RunRanks, tmp_path: Path) -> None:
    traced, plain = tmp_path / "traced", tmp_path / "plain"
    run_ranks(2, train, write_run(traced, train__steps=4, logging__profile=PROFILE))
    run_ranks(2, train, write_run(plain, train__steps=4))
    (trace,) = (traced / "run" / "profile").glob("*.json.gz")
    assert trace.name == "steps_00000002_00000003_rank_00001.json.gz"
    with gzip.open(trace) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"aten::mm", "aten::embedding"} <= names
    table = trace.with_name("steps_00000002_00000003_rank_00001.txt").read_text("utf-8")
    assert "aten::" in table and "Self CPU" in table
    assert losses(traced / "run") == losses(plain / "run")
    weights, expected = (master_weights(folder / "run" / "checkpoints" / "step_00000004") for folder in (traced, plain))
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    assert not (plain / "run" / "profile").exists()


def test_a_trace_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    options = load_config(write_run(tmp_path, logging__profile={"steps": [1, 1], "ranks": [0]}), []).logging.profile

    def killed(self: torch.profiler.profile, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    traced = StepProfile(options, tmp_path, ALONE)
    traced.begin_step(1)
    with mock.patch.object(torch.profiler.profile, "export_chrome_trace", killed), pytest.raises(KeyboardInterrupt):
        traced.end_step(1, stopping=False)
    assert not list((tmp_path / "profile").iterdir())


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({"steps": [7, 9]}, r"logging\.profile\.steps: \[7, 9\]; accepted: steps of the run, which has 8"),
        ({"steps": [3, 2]}, r"logging\.profile\.steps: \[3, 2\]; accepted: a list of the first and the last step"),
        ({"steps": [0, 2]}, "from 1 up"),
        ({"steps": [2]}, r"logging\.profile\.steps"),
        ({"steps": [2, 3], "ranks": [1, 1]}, r"logging\.profile\.ranks"),
        ({"steps": [2, 3], "ranks": []}, r"logging\.profile\.ranks"),
    ],
)
def test_steps_and_ranks_that_cannot_be_are_refused(tmp_path: Path, profile: dict[str, list[int]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write_run(tmp_path, logging__profile=profile), [])


def test_ranks_beyond_the_run_are_refused(tmp_path: Path) -> None:
    options = load_config(write_run(tmp_path, logging__profile=PROFILE), []).logging.profile
    check_ranks(options, 2)
    check_ranks(None, 1)
    with pytest.raises(ConfigError, match=r"logging\.profile\.ranks: \[1\]; accepted: ranks below 1"):
        check_ranks(options, 1)
