"""Checkpoints as models, and saves that are killed, refused or out of disk at every point."""

import errno
import os
import shutil
import signal
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_ext.checkpoint import save
from megatron_ext.checkpoint.choose import newest_whole
from megatron_ext.checkpoint.directory import latest, saved_steps
from megatron_ext.checkpoint.load import find_checkpoint, load_optimizer, verify
from megatron_ext.errors import CheckpointError, StorageError
from megatron_ext.parallel.world import World
from tests.checkpoint.tiny_state import CONFIG, trained, weight_of, writer
from tests.distributed import RunRanks
from tests.grids import ALONE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [2**30, 4000])
def test_a_checkpoint_is_a_model_that_transformers_loads(tmp_path: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    model, optimizer = trained(dtype=dtype)
    path = writer(tmp_path, max_shard_bytes=max_shard_bytes, dtype=dtype).save(7, weight_of(model), optimizer, {"tokens": 3}).path
    shards = len(list(path.glob("model*.safetensors")))
    assert (shards > 1) == (path / "model.safetensors.index.json").exists() == (max_shard_bytes == 4000)
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    assert loaded.dtype == dtype
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    tokens = torch.arange(20) % CONFIG.vocab_size
    ours = model.logits(tokens, torch.arange(20), torch.tensor([0, 20], dtype=torch.int32), 20)
    limit = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(loaded(input_ids=tokens[None]).logits[0].float(), ours.float(), rtol=limit, atol=limit)


def save_on(world: World, root: Path, dtype: torch.dtype) -> str:
    model, optimizer = trained(world, dtype)
    return str(writer(root, world, max_shard_bytes=4000, dtype=dtype).save(2, weight_of(model), optimizer, {"tokens": 3}).path)


def load_on(world: World, path: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Parameters, masters and moments of a rank that began with other values."""
    model, optimizer = trained(world, dtype, seed=99)
    verify(Path(path), world)
    load_optimizer(Path(path), optimizer, world)
    owned = {f"{rows}|{kind}": tensor.clone() for rows, values in optimizer.owned_state() for kind, tensor in values.items()}
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()} | owned


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_state_comes_back_bit_for_bit_on_any_number_of_ranks(run_ranks: RunRanks, tmp_path: Path, before: int, after: int) -> None:
    paths = run_ranks(before, save_on, tmp_path, torch.bfloat16)
    assert paths == [str(tmp_path / "step_00000002")] * before
    assert len(list((tmp_path / "step_00000002" / "optimizer").glob("owned-*.safetensors"))) == before
    model, _ = trained(dtype=torch.bfloat16)
    saved = [load_file(file) for file in (tmp_path / "step_00000002" / "optimizer").glob("*.safetensors")]
    elements = sum(tensor.numel() for file in saved for tensor in file.values())
    assert elements == 3 * CONFIG.num_parameters() and {t.dtype for file in saved for t in file.values()} == {torch.float32}
    results = run_ranks(after, load_on, paths[0], torch.bfloat16)
    for result in results:
        if before == after == 1 or before == 1:
            assert all(torch.equal(result[name], parameter) for name, parameter in model.named_parameters())
        assert all(torch.equal(result[name], results[0][name]) for name, _ in model.named_parameters())
        exported = {k: v for file in (tmp_path / "step_00000002").glob("*.safetensors") for k, v in load_file(file).items()}
        assert all(torch.equal(result[name], tensor) for name, tensor in exported.items())


def killed_at(call: int, root: Path, step: int = 2) -> bool:
    """Save step ``step`` in a fork that is killed just before its ``call``-th change of the disk; whether it came so far."""
    model, optimizer = trained(seed=2)
    child = os.fork()
    if child == 0:
        left = [call]

        def deadly(function: Any) -> Any:
            def wrapper(*arguments: Any, **keywords: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **keywords)

            return wrapper

        names = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")
        for name in names:
            setattr(os, name, deadly(getattr(os, name)))
        try:
            writer(root, keep_last=1).save(step, weight_of(model), optimizer, {})
        except BaseException:
            # Not one more line of the test runner may run here.
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_at_any_moment_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Also where only one checkpoint is kept, so that the save removes the one before."""
    first, second = (trained(seed=seed) for seed in (1, 2))
    calls, seen = 0, []
    while True:
        calls += 1
        root = tmp_path / str(calls)
        writer(root, keep_last=1).save(1, weight_of(first[0]), first[1], {})
        was_killed = killed_at(calls, root)
        path = find_checkpoint(root, "auto")
        assert path is not None
        assert verify(path, ALONE)["step"] == int(path.name[-1])
        seen.append(int(path.name[-1]))
        model, optimizer = trained(seed=3)
        load_optimizer(path, optimizer, ALONE)
        expected = (first, second)[seen[-1] - 1][0]
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
        writer(root, keep_last=1).save(3, weight_of(model), optimizer, {})
        assert sorted(entry.name for entry in root.iterdir()) == ["latest", "step_00000003"], "leftovers are cleaned"
        shutil.rmtree(root)
        if not was_killed:
            break
    assert calls > 20 and seen == sorted(seen) and set(seen) == {1, 2}


def test_killed_at_any_moment_a_save_of_the_only_checkpoints_step_leaves_a_whole_one(tmp_path: Path) -> None:
    """As of a run with ``checkpoint.resume=never`` where there is one checkpoint."""
    first, second = (trained(seed=seed) for seed in (1, 2))
    calls, seen = 0, []
    while True:
        calls += 1
        root = tmp_path / str(calls)
        writer(root).save(2, weight_of(first[0]), first[1], {})
        was_killed = killed_at(calls, root)
        path = find_checkpoint(root, "auto")
        assert path is not None and path == newest_whole(root).path and verify(path, ALONE)["step"] == 2
        model, optimizer = trained(seed=3)
        load_optimizer(path, optimizer, ALONE)
        found = [all(map(torch.equal, model.parameters(), each[0].parameters())) for each in (first, second)]
        seen.append(found.index(True))
        writer(root, keep_last=1).save(2, weight_of(model), optimizer, {})
        assert sorted(entry.name for entry in root.iterdir()) == ["latest", "step_00000002"], "leftovers are cleaned"
        shutil.rmtree(root)
        if not was_killed:
            break
    assert calls > 20 and seen == sorted(seen) and set(seen) == {0, 1}


def test_killed_at_any_moment_the_very_first_save_leaves_all_or_nothing(tmp_path: Path) -> None:
    calls, found = 0, []
    while True:
        calls += 1
        root = tmp_path / str(calls)
        was_killed = killed_at(calls, root)
        path = find_checkpoint(root, "auto")
        found.append(path is not None)
        if path is not None:
            assert verify(path, ALONE)["step"] == 2
        if not was_killed:
            break
    assert found[0] is False and found[-1] is True and found == sorted(found)


def fail_on_last_rank(world: World, root: Path, name: str, error: OSError) -> tuple[str, list[str]]:
    """Save step 1, then step 2 with ``name`` failing on the last rank only; the error that this rank sees, and what is there then."""
    model, optimizer = trained(world)
    checkpoints = writer(root, world)
    checkpoints.save(1, weight_of(model), optimizer, {})

    def failing(*arguments: Any) -> Any:
        raise error

    place = save.OwnedFile if name == "write" else save
    failing = failing if world.rank == world.size - 1 else getattr(place, name)
    with mock.patch.object(place, name, failing), pytest.raises(StorageError) as caught:
        checkpoints.save(2, weight_of(model), optimizer, {})
    seen = sorted(path.name for path in root.iterdir())
    world.barrier()
    checkpoints.save(3, weight_of(model), optimizer, {})
    return str(caught.value), seen


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), PermissionError(errno.EACCES, "Permission denied")],
    ids=["disk full", "permission"],
)
def test_an_error_on_one_rank_is_one_on_all_and_leaves_the_old_checkpoint(run_ranks: RunRanks, tmp_path: Path, error: OSError) -> None:
    for message, seen in run_ranks(2, fail_on_last_rank, tmp_path, "write", error):
        assert message.startswith(f"rank 1: cannot save the checkpoint: {type(error).__name__}: {error}")
        assert ("The checkpoint needs 0.1 MiB; without it" in message) == (error.errno == errno.ENOSPC)
        assert seen == ["latest", "step_00000001"], "nothing of the failed save is left"
    assert [path.name for path in saved_steps(tmp_path)] == ["step_00000001", "step_00000003"]
    verify(tmp_path / "step_00000001", ALONE)


@pytest.mark.parametrize("name", ["begin", "publish", "write_json"])
def test_an_error_of_the_main_rank_leaves_the_old_checkpoint(tmp_path: Path, name: str) -> None:
    error = OSError(errno.EDQUOT, "Disk quota exceeded")
    message, seen = fail_on_last_rank(ALONE, tmp_path, name, error)
    assert message.startswith("cannot save the checkpoint: OSError: [Errno 122] Disk quota exceeded")
    assert not [name for name in seen if name.startswith(".")]
    verify(tmp_path / "step_00000001", ALONE)
    assert latest(tmp_path) == tmp_path / "step_00000003"


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), CheckpointError("latest says nothing")])
def test_a_checkpoint_that_is_in_its_place_is_saved_whatever_becomes_of_older_ones(tmp_path: Path, error: Exception) -> None:
    model, optimizer = trained()
    with mock.patch.object(save, "keep_newest", mock.Mock(side_effect=error)):
        saved = writer(tmp_path).save(2, weight_of(model), optimizer, {})
    assert saved.path == tmp_path / "step_00000002" and saved.evicted == [] and saved.not_removed == [f"{tmp_path}: {error}"]
    assert verify(saved.path, ALONE)["step"] == 2


def test_an_unknown_room_is_no_reason_to_hide_that_the_disk_is_full(tmp_path: Path) -> None:
    with mock.patch.object(shutil, "disk_usage", mock.Mock(side_effect=OSError(errno.ESTALE, "Stale file handle"))):
        message, _ = fail_on_last_rank(ALONE, tmp_path, "write", OSError(errno.ENOSPC, "No space left on device"))
    assert "No space left on device" in message and f"{tmp_path} has an unknown room (Stale file handle)" in message


def test_every_file_of_an_older_checkpoint_that_is_removed_is_told_of(tmp_path: Path) -> None:
    world = World(0, 1, torch.device("cpu"))
    model, optimizer = trained(world)
    moves = [world.activity.moves]
    for step in (1, 2):
        saved = writer(tmp_path, world, keep_last=1).save(step, weight_of(model), optimizer, {})
        moves.append(world.activity.moves)
    files = [path for path in saved.path.rglob("*") if path.is_file()]
    assert (moves[2] - moves[1]) - (moves[1] - moves[0]) == len(files) > 5


def amend_on(world: World, root: Path) -> str:
    """Save a step, then amend it while a record of rank 0 cannot be written; the error that this rank sees."""
    model, optimizer = trained(world)
    path = writer(root, world).save(1, weight_of(model), optimizer, {"tokens": 1}).path
    flush = mock.Mock(side_effect=StorageError("events.jsonl cannot be written") if world.is_main else None)
    with pytest.raises(StorageError) as caught:
        replace(writer(root, world), flush_records=flush).amend(path, {"tokens": 2})
    return str(caught.value)


def test_a_checkpoint_is_not_amended_before_the_records_that_tell_of_it_are_written(run_ranks: RunRanks, tmp_path: Path) -> None:
    assert run_ranks(2, amend_on, tmp_path) == ["cannot amend the checkpoint: events.jsonl cannot be written"] * 2
    assert verify(tmp_path / "step_00000001", ALONE)["tokens"] == 1
    writer(tmp_path).amend(tmp_path / "step_00000001", {"tokens": 2})
    assert verify(tmp_path / "step_00000001", ALONE)["tokens"] == 2


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    model, optimizer = trained()
    for step in range(1, 6):
        writer(tmp_path, keep_last=2).save(step, weight_of(model), optimizer, {})
    assert [path.name for path in saved_steps(tmp_path)] == ["step_00000004", "step_00000005"]
