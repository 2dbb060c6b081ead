"""Whatever reads the model of a run's checkpoint notices one byte that is not as it was saved."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ext.checkpoint.load import check_undamaged
from megatron_ext.errors import CheckpointError
from megatron_ext.parallel.world import World
from tests.distributed import RankError, RunRanks
from tests.grids import ALONE
from tests.tools.loading import load_tool
from tests.train.test_positions import write_tokenizer
from tests.train.tiny_run import losses, train, write_run

TOOLS = {
    "evaluate": ["--model", "MODEL", "--data", "x", "--output", "TMP/result.json"],
    "quantize": ["--model", "MODEL", "--data", "x", "--output", "TMP/result.json"],
    "convert_checkpoint": ["export", "MODEL", "TMP/exported"],
    "generate": ["--model", "MODEL", "--prompt", "x"],
}


@pytest.fixture
def damaged(run_ranks: RunRanks, tmp_path: Path) -> Path:
    """A checkpoint with one flipped bit in the last value of its exported weights."""
    run_ranks(1, train, write_run(tmp_path / "before", train__steps=2))
    checkpoint = tmp_path / "before" / "run" / "checkpoints" / "step_00000002"
    check_undamaged(checkpoint, ALONE)
    flip(checkpoint / "model.safetensors")
    return checkpoint


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("tool", TOOLS)
def test_tools_refuse_it(
    damaged: Path, tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [word.replace("MODEL", str(damaged)).replace("TMP", str(tmp_path)) for word in TOOLS[tool]]
    monkeypatch.setattr(sys, "argv", [tool, *words])
    with pytest.raises(SystemExit) as ended:
        sys.exit(load_tool(tool).main())
    assert ended.value.code == 1
    assert f"{damaged / 'model.safetensors'} is altered: its SHA-256 is not the one that was saved" in capsys.readouterr().err
    assert not list(tmp_path.glob("exported*")) and not list(tmp_path.glob("result*"))


@pytest.mark.parametrize(
    "changes",
    [
        lambda path: {"model": {"init_from": path}},
        lambda path: {"model": {"init_from": path}, "optimizer__sharding": "zero3"},
        lambda path: {"distillation": {"teacher": path, "kl": {"weight": 1.0}}},
    ],
    ids=["init_from", "init_from with zero3", "teacher"],
)
def test_runs_refuse_it_on_all_ranks(run_ranks: RunRanks, damaged: Path, tmp_path: Path, changes: Callable[[str], dict]) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    config = write_run(tmp_path / "after", train__steps=2, tokenizer=str(tmp_path / "tokenizer"), **changes(str(damaged)))
    with pytest.raises(RankError, match="CheckpointError: .*model.safetensors is altered.* is taken without its trainer_state.json"):
        run_ranks(2, train, config)
    (damaged / "trainer_state.json").unlink()
    run_ranks(2, train, config)


def check_copy(world: World, folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_undamaged(folder / str(world.rank), world)
    return str(caught.value)


def test_all_ranks_refuse_a_copy_that_one_host_has_without_its_hashes(run_ranks: RunRanks, damaged: Path, tmp_path: Path) -> None:
    flip(damaged / "model.safetensors")
    for rank in range(2):
        shutil.copytree(damaged, tmp_path / "copies" / str(rank))
    missing = tmp_path / "copies" / "1" / "trainer_state.json"
    missing.unlink()
    first, second = run_ranks(2, check_copy, tmp_path / "copies")
    assert first == second and f"{missing}: [Errno 2] No such file or directory" in first


def test_a_run_that_resumes_needs_no_hashes_of_its_first_weights(run_ranks: RunRanks, damaged: Path, tmp_path: Path) -> None:
    flip(damaged / "model.safetensors")
    write_tokenizer(tmp_path / "tokenizer")
    options = {"tokenizer": str(tmp_path / "tokenizer"), "model": {"init_from": str(damaged)}, "checkpoint__every": 1}
    config = write_run(tmp_path / "after", train__steps=2, **options)
    run_ranks(1, train, config)
    flip(damaged / "model.safetensors")
    run_ranks(1, train, config, ["train.steps=3"])
    assert sorted(losses(tmp_path / "after" / "run")) == [1, 2, 3]
    with pytest.raises(RankError, match="model.safetensors is altered"):
        run_ranks(1, train, config, ["checkpoint.resume=never"])


def test_what_only_resuming_reads_is_no_part_of_the_model(damaged: Path) -> None:
    flip(damaged / "model.safetensors")
    flip(next((damaged / "optimizer").glob("*.safetensors")))
    check_undamaged(damaged)
    (damaged / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json is missing"):
        check_undamaged(damaged)
