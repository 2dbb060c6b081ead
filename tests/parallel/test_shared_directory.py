from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.parallel import shared_directory
from megatron_ext.parallel.world import World
from tests.distributed import RunRanks
from tests.grids import ALONE
from tests.mounts import mounted


def prove(world: World, folders: list[Path]) -> str | None:
    """The error that this rank sees, where each rank has its own idea of the directory."""
    with mock.patch.object(shared_directory, "PATIENCE_SECONDS", 0.5):
        try:
            shared_directory.prove_shared(folders[world.rank], world)
        except ConfigError as error:
            return str(error)
    return None


def test_one_directory_is_accepted_and_left_empty(run_ranks: RunRanks, tmp_path: Path) -> None:
    assert run_ranks(2, prove, [tmp_path, tmp_path]) == [None, None]
    assert list(tmp_path.iterdir()) == []


def test_another_directory_on_a_host_is_refused_on_all_ranks(run_ranks: RunRanks, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    messages = run_ranks(2, prove, [tmp_path / "a", tmp_path / "b"])
    assert all(message is not None and "run_dir is" in message and "all hosts share" in message for message in messages)
    assert list((tmp_path / "a").iterdir()) == []


@pytest.mark.parametrize("exists", [True, False])
def test_a_single_process_has_nothing_to_prove(tmp_path: Path, exists: bool) -> None:
    shared_directory.prove_shared(tmp_path if exists else tmp_path / "missing", ALONE)


def test_a_directory_that_can_be_written_to_is_made_and_left_empty(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for directory in (tmp_path / "new" / "run", tmp_path / "link"):
        shared_directory.prove_writable(directory)
        assert list(directory.iterdir()) == []


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("what somebody else keeps there", "utf-8")
    with pytest.raises(ConfigError, match=r"run_dir is '.*file.*': .*; accepted: a directory that can be written to"):
        shared_directory.prove_writable(tmp_path / "file" / below)
    assert (tmp_path / "file").read_text("utf-8") == "what somebody else keeps there"


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that not even root may write to, whom permissions do not stop."""
    with mounted(tmp_path / "read_only", "ro,size=64k") as folder:
        yield folder


@pytest.mark.parametrize("below", ["", "run"])
def test_a_file_system_that_is_read_only_is_refused(read_only: Path, below: str) -> None:
    with pytest.raises(ConfigError, match="run_dir is '.*read_only.*': Read-only file system; accepted: a directory that can be written"):
        shared_directory.prove_writable(read_only / below)
