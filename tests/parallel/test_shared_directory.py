from pathlib import Path
from unittest import mock

import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.parallel import shared_directory
from megatron_ext.parallel.world import World
from tests.distributed import RunRanks
from tests.grids import ALONE


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
