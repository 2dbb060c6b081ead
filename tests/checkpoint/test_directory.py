import os
from pathlib import Path
from unittest import mock

import pytest

from megatron_ext.checkpoint.directory import begin, keep_newest, latest, publish, saved_steps, step_directory
from megatron_ext.errors import CheckpointError


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
    assert names(tmp_path) == ["latest", "step_00000001"]


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
    assert evicted == [step_directory(tmp_path, step) for step in (4, 6, 8) if step not in kept]


def test_a_checkpoint_that_is_replaced_leaves_a_pointer_to_an_older_one(tmp_path: Path) -> None:
    """Killed between the two renames, as by going on from step 10 although step 20 is the latest."""
    save(tmp_path, 10, 20)
    beside = begin(tmp_path, 20)
    renames = [os.rename, mock.Mock(side_effect=KeyboardInterrupt)]
    with mock.patch.object(os, "rename", lambda *paths: renames.pop(0)(*paths)), pytest.raises(KeyboardInterrupt):
        publish(tmp_path, beside, 20)
    assert latest(tmp_path) == tmp_path / "step_00000010" and (tmp_path / "step_00000010" / "file").exists()
    save(tmp_path, 20)
    assert names(tmp_path) == ["latest", "step_00000010", "step_00000020"] and latest(tmp_path) == tmp_path / "step_00000020"


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
