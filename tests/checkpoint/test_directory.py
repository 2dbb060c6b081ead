import errno
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_ext.checkpoint.directory import Eviction, begin, keep_newest, latest, publish, saved_steps, step_directory, step_of
from megatron_ext.errors import CheckpointError
from tests.mounts import fill, mounted


def save(root: Path, *steps: int, mark: str = "") -> None:
    for step in steps:
        beside = begin(root, step)
        (beside / "file").write_text(mark or str(step), "utf-8")
        publish(root, beside, step)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_saved_steps_are_listed_oldest_first_and_latest_names_the_last(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    assert latest(root) is None and saved_steps(root) == []
    save(root, 9, 10, 100000000 - 1)
    (root / "step_123").mkdir()
    (root / "step_00000011").write_text("a file", "utf-8")
    assert saved_steps(root) == [step_directory(root, step) for step in (9, 10, 99999999)]
    assert latest(root) == root / "step_99999999"


def test_what_an_interrupted_save_left_is_cleaned(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (begin(tmp_path, 2) / "half").write_text("half", "utf-8")
    (tmp_path / ".step_00000000.removed").mkdir()
    (tmp_path / ".latest.123.tmp").write_text("st", "utf-8")
    assert latest(tmp_path) == tmp_path / "step_00000001", "an unfinished save is never taken for a checkpoint"
    save(tmp_path, 3)
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000003"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 1, mark="again")
    assert (tmp_path / "step_00000001" / "file").read_text("utf-8") == "again"
    assert keep_newest(tmp_path, 1).removed == [] and names(tmp_path) == ["latest", "step_00000001"]


@pytest.mark.parametrize(("count", "kept"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4]), (0, [4])])
def test_the_newest_are_kept(tmp_path: Path, count: int, kept: list[int]) -> None:
    save(tmp_path, 1, 2, 3, 4)
    keep_newest(tmp_path, count)
    assert saved_steps(tmp_path) == [step_directory(tmp_path, step) for step in kept]


@pytest.mark.parametrize(("every", "kept"), [(None, [12]), (1, [4, 6, 8, 12]), (4, [4, 8, 12]), (5, [12])])
def test_every_nth_is_kept_for_good(tmp_path: Path, every: int | None, kept: list[int]) -> None:
    save(tmp_path, 4, 6, 8, 12)
    evicted = keep_newest(tmp_path, 1, every)
    assert saved_steps(tmp_path) == [step_directory(tmp_path, step) for step in kept]
    assert evicted.removed == [step_directory(tmp_path, step) for step in (4, 6, 8) if step not in kept]


def renames_until(call: int, error: BaseException) -> AbstractContextManager[None]:
    """Of all renames, the ``call``-th and later ones do not happen."""
    left, rename, replace = [call], os.rename, os.replace

    def counted(function: Callable[..., None]) -> Callable[..., None]:
        def wrapper(*paths: Path) -> None:
            left[0] -= 1
            if left[0] <= 0:
                raise error
            function(*paths)

        return wrapper

    return mock.patch.multiple(os, rename=counted(rename), replace=counted(replace))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")], ids=["killed", "failed"])
@pytest.mark.parametrize("older", [[], [10]], ids=["the only one", "beside an older one"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_checkpoint_that_is_saved_again_stands_until_the_new_one_does(
    tmp_path: Path, older: list[int], call: int, error: BaseException
) -> None:
    """Interrupted before each rename in turn."""
    save(tmp_path, *older)
    save(tmp_path, 20, mark="before")
    beside = begin(tmp_path, 20)
    (beside / "file").write_text("again", "utf-8")
    with renames_until(call, error), pytest.raises(type(error)):
        publish(tmp_path, beside, 20)
    found = latest(tmp_path)
    assert found is not None and step_of(found) == 20
    assert (found / "file").read_text("utf-8") == ("again" if call == 3 else "before")
    assert [step_of(path) for path in saved_steps(tmp_path)] == [*older, 20] and saved_steps(tmp_path)[-1] == found
    save(tmp_path, 30)
    assert keep_newest(tmp_path, 9).problems == []
    assert [step_of(path) for path in saved_steps(tmp_path)] == [*older, 20, 30], "it counts, until another has its place"
    save(tmp_path, 20, mark="last")
    keep_newest(tmp_path, 9)
    assert names(tmp_path) == ["latest", *(f"step_{step:08d}" for step in [*older, 20, 30])]
    assert (tmp_path / "step_00000020" / "file").read_text("utf-8") == "last"


@pytest.mark.parametrize("older", [[], [20]])
def test_a_disk_that_is_full_when_the_pointer_is_written_leaves_no_new_checkpoint(tmp_path: Path, older: list[int]) -> None:
    with mounted(tmp_path / "disk", "size=64k") as root:
        save(root, 10, *older)
        beside, before = begin(root, 20), saved_steps(root)
        fill(root)
        with pytest.raises(OSError, match="No space left"):
            publish(root, beside, 20)
        assert saved_steps(root) == before and latest(root) == before[-1]
        assert beside.exists(), "whoever gives up the save removes it"


def test_saves_of_one_step_never_write_into_the_same_directory(tmp_path: Path) -> None:
    assert begin(tmp_path, 1).name != begin(tmp_path, 1).name


def test_the_only_good_one_is_never_deleted(tmp_path: Path) -> None:
    """After resuming from an older checkpoint, those of the attempt that was given up do not push out the run's own."""
    save(tmp_path, 10, 20, 30, 11)
    keep_newest(tmp_path, 1)
    assert latest(tmp_path) == tmp_path / "step_00000011"
    assert saved_steps(tmp_path) == [step_directory(tmp_path, step) for step in (11, 20, 30)]


def test_a_first_save_that_was_killed_before_the_pointer_counts(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "latest").unlink()
    assert latest(tmp_path) == tmp_path / "step_00000005"


def test_a_missing_pointer_is_refused_where_it_could_hide_newer_steps(tmp_path: Path) -> None:
    save(tmp_path, 5, 6)
    (tmp_path / "latest").unlink()
    with pytest.raises(CheckpointError, match="latest is missing, but .* has 2 checkpoints"):
        latest(tmp_path)


@pytest.mark.parametrize("text", ["", "step_5", "../step_00000005", "/etc", "step_00000005x", "\xff"])
def test_a_garbled_pointer_is_refused(tmp_path: Path, text: str) -> None:
    save(tmp_path, 5)
    (tmp_path / "latest").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="latest says .*; accepted: the name of a checkpoint such as step_00000100"):
        latest(tmp_path)


@pytest.mark.parametrize("step", [1, 2, 3], ids=["evicted", "kept", "saved again"])
def test_a_checkpoint_that_is_a_link_is_never_followed(tmp_path: Path, step: int) -> None:
    """Its user moved it to an archive."""
    root, archive = tmp_path / "checkpoints", tmp_path / "archive"
    save(root, 1, 2, *([3] if step == 3 else []))
    shutil.move(step_directory(root, step), archive)
    step_directory(root, step).symlink_to(archive)
    save(root, 3)
    assert keep_newest(root, 2).problems == []
    assert names(root) == ["latest", "step_00000002", "step_00000003"] and step_directory(root, 2).is_symlink() == (step == 2)
    assert (archive / "file").read_text("utf-8") == str(step)
    save(root, 4)


def test_leftovers_that_are_links_or_files_are_removed(tmp_path: Path) -> None:
    save(tmp_path / "root", 1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root" / ".step_00000001.removed").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / ".step_00000002.removed").symlink_to(tmp_path / "nowhere")
    (tmp_path / "root" / ".step_00000003.tmp").write_text("a file", "utf-8")
    save(tmp_path / "root", 2)
    assert names(tmp_path / "root") == ["latest", "step_00000001", "step_00000002"] and (tmp_path / "elsewhere").exists()


def test_every_file_that_is_removed_is_told_of(tmp_path: Path) -> None:
    """Or a rank that removes a large checkpoint from a slow file system would look like one that hangs."""
    save(tmp_path, 1)
    for name in ("one", "optimizer/two", "optimizer/three"):
        (tmp_path / "step_00000001" / name).write_text("", "utf-8")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "step_00000001" / "link").symlink_to(tmp_path / "elsewhere")
    save(tmp_path, 2)
    moves: list[list[str]] = []
    keep_newest(tmp_path, 1, moved=lambda: moves.append(names(tmp_path)))
    assert len(moves) == 4 and all(any(name.endswith(".removed") for name in seen) for seen in moves)
    assert names(tmp_path) == ["elsewhere", "latest", "step_00000002"]
    (tmp_path / ".step_00000003.0.tmp").mkdir()
    (tmp_path / ".step_00000003.0.tmp" / "file").write_text("", "utf-8")
    begin(tmp_path, 3, lambda: moves.append(names(tmp_path)))
    assert len(moves) == 5


def test_what_cannot_be_removed_is_told_and_in_nobodys_way(tmp_path: Path) -> None:
    """One checkpoint cannot be renamed, one only renamed, and the one that is saved again cannot be removed; later all of them can."""
    rename, rmtree = os.rename, shutil.rmtree

    def stuck_rename(path: Path, to: Path) -> None:
        if path.name == "step_00000001":
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        rename(path, to)

    def stuck_rmtree(path: Path, **options: Any) -> None:
        if "step_00000002" in path.name or "step_00000004" in path.name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path / "file"))
        rmtree(path, **options)

    with mock.patch.object(os, "rename", stuck_rename), mock.patch.object(shutil, "rmtree", stuck_rmtree):
        save(tmp_path, 1, 2, 3)
        first = keep_newest(tmp_path, 1)
        assert first.removed == [tmp_path / "step_00000002"]
        assert "step_00000001 cannot be removed: [Errno 16] Device or resource busy" in first.problems[0]
        assert "/.step_00000002." in first.problems[1] and "cannot be removed: [Errno 13] Permission denied" in first.problems[1]
        assert len(first.problems) == 2
        for mark in "abc":
            save(tmp_path, 4, mark=mark)
            again = keep_newest(tmp_path, 1)
            assert latest(tmp_path) == tmp_path / "step_00000004" and (tmp_path / "step_00000004" / "file").read_text("utf-8") == mark
        assert len(again.problems) == 4, "steps 1 and 2, and step 4 twice"
    assert keep_newest(tmp_path, 1) == Eviction([tmp_path / "step_00000001"], [])
    assert names(tmp_path) == ["latest", "step_00000004"]
