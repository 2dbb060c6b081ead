"""Saves that go on while the model changes: the same files as of one that waited, and errors that all ranks see."""

import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_ext.checkpoint import save
from megatron_ext.checkpoint.background import BackgroundSave
from megatron_ext.checkpoint.directory import latest
from megatron_ext.checkpoint.load import verify
from megatron_ext.checkpoint.save import CheckpointWriter, OwnedFile
from megatron_ext.errors import NonFiniteError, StorageError
from megatron_ext.model.gpt import GPT
from megatron_ext.optim.sharded import ShardedOptimizer
from megatron_ext.parallel.world import World
from tests.checkpoint.tiny_state import trained, weight_of, writer
from tests.distributed import RunRanks
from tests.grids import ALONE


def start(checkpoints: CheckpointWriter, step: int, model: GPT, optimizer: ShardedOptimizer) -> BackgroundSave:
    job = checkpoints.begin(step, weight_of(model), optimizer, {"tokens": 3}, copied=True)
    return BackgroundSave(checkpoints, job, ThreadPoolExecutor(1))


def ruin(model: GPT, optimizer: ShardedOptimizer) -> None:
    """Change everything that the optimizer and the model hold, as the next step would."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
        for _, values in optimizer.owned_state():
            for tensor in values.values():
                tensor.fill_(7)


def save_both_ways(world: World, root: Path, dtype: torch.dtype) -> None:
    """Save in the background while the model is changed, and save the same state with the caller waiting."""
    model, optimizer = trained(world, dtype)
    pending = start(writer(root / "background", world, dtype=dtype, max_shard_bytes=4000), 2, model, optimizer)
    ruin(model, optimizer)
    world.barrier()
    pending.wait()
    model, optimizer = trained(world, dtype)
    writer(root / "waited", world, dtype=dtype, max_shard_bytes=4000).save(2, weight_of(model), optimizer, {"tokens": 3})


@pytest.mark.parametrize(("ranks", "dtype"), [(1, torch.float32), (2, torch.bfloat16)])
def test_what_is_written_is_the_state_when_the_save_began(run_ranks: RunRanks, tmp_path: Path, ranks: int, dtype: torch.dtype) -> None:
    run_ranks(ranks, save_both_ways, tmp_path, dtype)
    states = [verify(tmp_path / name / "step_00000002", ALONE) for name in ("background", "waited")]
    assert states[0] == states[1], "with the hash of every file"
    assert len(states[0]["files"]) > 4


def look_while_one_writes(world: World, root: Path) -> list[bool]:
    """Whether ``look`` found the save at its end: while the last rank is kept from writing, and after it was let go."""
    model, optimizer = trained(world)
    gate, original = threading.Event(), OwnedFile.write

    def wait_at_gate(self: OwnedFile, *arguments: Any) -> list[str]:
        gate.wait()
        return original(self, *arguments)

    if world.rank < world.size - 1:
        gate.set()
    seen = []
    with mock.patch.object(OwnedFile, "write", wait_at_gate):
        pending = start(writer(root, world), 2, model, optimizer)
        seen += [pending.look() is not None for _ in range(3)]
        assert latest(root) is None
        world.barrier()
        gate.set()
        while (saved := pending.look()) is None:
            pass
    assert saved.path == root / "step_00000002" == latest(root) and saved.num_bytes > 1000 and saved.evicted == []
    return seen


def test_nobody_waits_for_a_rank_that_writes(run_ranks: RunRanks, tmp_path: Path) -> None:
    assert run_ranks(2, look_while_one_writes, tmp_path) == [[False] * 3] * 2


def fail_in_background(world: World, root: Path, name: str) -> tuple[str, list[str]]:
    model, optimizer = trained(world)
    writer(root, world).save(1, weight_of(model), optimizer, {})

    def full(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    place = OwnedFile if name == "write" else save
    with mock.patch.object(place, name, full if world.rank == world.size - 1 or name != "write" else getattr(place, name)):
        pending = start(writer(root, world), 2, model, optimizer)
        with pytest.raises(StorageError) as caught:
            while pending.look() is None:
                pass
    seen = sorted(path.name for path in root.iterdir())
    world.barrier()
    start(writer(root, world), 3, model, optimizer).wait()
    return str(caught.value), seen


@pytest.mark.parametrize(("name", "who"), [("write", "rank 1: "), ("write_json", ""), ("publish", "")])
def test_an_error_of_a_thread_is_raised_on_all_ranks(run_ranks: RunRanks, tmp_path: Path, name: str, who: str) -> None:
    for message, seen in run_ranks(2, fail_in_background, tmp_path, name):
        assert message.startswith(f"{who}cannot save the checkpoint: OSError: [Errno 28] No space left on device. The checkpoint needs ")
        assert seen == ["latest", "step_00000001"]
    assert latest(tmp_path) == tmp_path / "step_00000003"


def save_ruined(world: World, root: Path, kind: str, background: bool) -> str:
    """Save step 1, then step 2 with one value that is not finite, on one rank; the error that this rank sees."""
    model, optimizer = trained(world)
    checkpoints = writer(root, world, keep_last=1)
    checkpoints.save(1, weight_of(model), optimizer, {})
    weight = weight_of(model)
    part, values = list(optimizer.owned_state())[-1]
    if world.rank == world.size - 1:
        with torch.no_grad():
            target = values["master"].clone() if kind == "exported" else values[kind]
            target.view(-1)[1] = float("nan" if kind == "master" else "inf")

    def exported(name: str) -> torch.Tensor:
        return torch.full_like(weight(name), float("inf")) if kind == "exported" and name == part.name else weight(name).nan_to_num(0, 0, 0)

    with pytest.raises(NonFiniteError) as caught:
        if background:
            job = checkpoints.begin(2, exported, optimizer, {}, copied=True)
            BackgroundSave(checkpoints, job, ThreadPoolExecutor(1)).wait()
        else:
            checkpoints.save(2, exported, optimizer, {})
    return str(caught.value)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("kind", ["master", "exp_avg_sq", "exported"])
def test_a_state_that_is_not_finite_never_replace_a_checkpoint(run_ranks: RunRanks, tmp_path: Path, kind: str, background: bool) -> None:
    messages = run_ranks(2, save_ruined, tmp_path, kind, background)
    assert messages[0] == messages[1]
    assert f"({kind}) are not finite, the first at [" in messages[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]
    assert verify(tmp_path / "step_00000001", ALONE)["step"] == 1
