"""Damage of every kind of file is refused by name, and the next older whole checkpoint is offered."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint.load import find_checkpoint, load_optimizer, verify
from megatron_ext.errors import CheckpointError
from megatron_ext.parallel.world import World
from tests.checkpoint.tiny_state import trained, weight_of, writer
from tests.distributed import RunRanks
from tests.grids import ALONE, owner_optimizer

FILES = [
    "model-00001-of-*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "tokenizer.json",
    "optimizer/owned-00001-of-00001.safetensors",
    "optimizer/index.json",
    "trainer_state.json",
]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine")
    model, optimizer = trained()
    for step in (1, 2, 3):
        writer(root, keep_last=3, max_shard_bytes=4000).save(step, weight_of(model), optimizer, {"tokens": step})
    return root


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    """Steps 1, 2 and 3, all whole."""
    return Path(shutil.copytree(pristine, tmp_path / "checkpoints"))


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def alter(path: Path) -> None:
    """One character, the last digit or letter, and the same size."""
    content = bytearray(path.read_bytes())
    place = max(i for i, byte in enumerate(content) if chr(byte).isalnum()) if path.suffix == ".json" else len(content) - 5
    content[place] ^= 1
    path.write_bytes(content)


def resume(root: Path) -> dict:
    """What a run with ``checkpoint.resume=auto`` reads."""
    path = find_checkpoint(root, "auto")
    assert path is not None
    return verify(path, ALONE)


@pytest.mark.parametrize("damage", [remove, truncate, empty, alter])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_older_checkpoint_offered(root: Path, name: str, damage: Callable[[Path], None]) -> None:
    assert resume(root)["step"] == 3
    (path,) = (root / "step_00000003").glob(name)
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        resume(root)
    assert str(path) in str(caught.value)
    assert f"The next older whole checkpoint is {root / 'step_00000002'}: resume from it with checkpoint.resume=" in str(caught.value)
    offered = find_checkpoint(root, str(caught.value).rpartition("checkpoint.resume=")[2])
    assert offered is not None and verify(offered, ALONE)["step"] == 2


def test_a_damaged_older_checkpoint_is_not_offered(root: Path) -> None:
    truncate(root / "step_00000003" / "config.json")
    truncate(root / "step_00000002" / "optimizer" / "index.json")
    with pytest.raises(CheckpointError, match=r"config\.json is truncated.*next older whole checkpoint is .*step_00000001"):
        resume(root)
    remove(root / "step_00000001" / "trainer_state.json")
    with pytest.raises(CheckpointError, match="There is no older whole checkpoint"):
        resume(root)


def test_every_damaged_file_is_named(root: Path) -> None:
    remove(root / "step_00000003" / "config.json")
    alter(root / "step_00000003" / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"config\.json is missing; .*tokenizer\.json is altered"):
        resume(root)


def test_a_missing_directory_is_named(root: Path) -> None:
    shutil.rmtree(root / "step_00000003")
    with pytest.raises(CheckpointError, match=r"step_00000003 is missing\. The next older whole checkpoint is .*step_00000002"):
        resume(root)
    with pytest.raises(CheckpointError, match="nowhere is missing"):
        find_checkpoint(root, str(root / "nowhere"))


@pytest.mark.parametrize("damage", [remove, truncate, empty])
def test_a_damaged_pointer_offers_the_newest_whole_checkpoint(root: Path, damage: Callable[[Path], None]) -> None:
    (root / "latest").write_text("step_0000000", "utf-8")
    damage(root / "latest")
    with pytest.raises(CheckpointError, match=r"latest .*The next older whole checkpoint is .*step_00000003"):
        resume(root)


def test_nothing_saved_and_never(root: Path, tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "none", "auto") is None
    assert find_checkpoint(root, "never") is None


def test_a_branch_begins_elsewhere_until_it_has_a_checkpoint_of_its_own(root: Path, tmp_path: Path) -> None:
    trunk = root / "step_00000002"
    assert find_checkpoint(tmp_path / "none", "auto", str(trunk)) == trunk
    assert find_checkpoint(root, "auto", str(tmp_path / "trunk")) == root / "step_00000003"
    with pytest.raises(CheckpointError, match="trunk is missing"):
        find_checkpoint(tmp_path / "none", "auto", str(tmp_path / "trunk"))


def test_a_file_outside_the_checkpoint_is_refused(root: Path) -> None:
    from megatron_ext.checkpoint.manifest import read_state, seal

    path = root / "step_00000003" / "trainer_state.json"
    state = read_state(path.parent)
    state["files"]["../../secret"] = {"bytes": 1, "sha256": ""}
    path.write_text(json.dumps(seal({key: value for key, value in state.items() if key != "sha256"})), "utf-8")
    with pytest.raises(CheckpointError, match=r"lists '../../secret', which is outside the checkpoint"):
        resume(root)


def verify_on(world: World, directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        verify(directory, world)
    return str(caught.value)


def test_all_ranks_refuse_what_one_of_them_finds(run_ranks: RunRanks, root: Path) -> None:
    alter(root / "step_00000003" / "optimizer" / "index.json")
    messages = run_ranks(2, verify_on, root / "step_00000003")
    assert messages[0] == messages[1] and messages[0].count("index.json is altered") == 1


def test_a_checkpoint_of_another_model_is_refused(root: Path) -> None:
    wide = torch.nn.Linear(4, 4)
    optimizer = owner_optimizer(wide.named_parameters(), lambda owned: torch.optim.AdamW([t for _, t in owned]))
    with pytest.raises(CheckpointError, match=r"of another model: it lacks \['bias', 'weight'\] and has \['lm_head.weight'"):
        load_optimizer(root / "step_00000003", optimizer, ALONE)


def test_a_model_of_another_width_is_refused(root: Path) -> None:
    named = [
        (name, torch.nn.Parameter(torch.zeros(*p.shape[:-1], p.shape[-1] + 1))) for name, p in trained()[0].named_parameters() if p.ndim > 1
    ]
    named += [(name, torch.nn.Parameter(torch.zeros(p.shape))) for name, p in trained()[0].named_parameters() if p.ndim == 1]
    optimizer = owner_optimizer(named, lambda owned: torch.optim.AdamW([t for _, t in owned]))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight is \[50, 16\] in the checkpoint, \[50, 17\] in the model"):
        load_optimizer(root / "step_00000003", optimizer, ALONE)


def test_a_larger_vocabulary_is_refused(root: Path) -> None:
    named = [(name, torch.nn.Parameter(torch.zeros(p.shape[0] + 1, *p.shape[1:]))) for name, p in trained()[0].named_parameters()]
    optimizer = owner_optimizer(named, lambda owned: torch.optim.AdamW([t for _, t in owned]))
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight is \[50, 16\] in the checkpoint, \[51, 16\] in the model"):
        load_optimizer(root / "step_00000003", optimizer, ALONE)


def test_a_smaller_vocabulary_is_refused(root: Path) -> None:
    named = [(name, torch.nn.Parameter(torch.zeros(p.shape[0] - 1, *p.shape[1:]))) for name, p in trained()[0].named_parameters()]
    optimizer = owner_optimizer(named, lambda owned: torch.optim.AdamW([t for _, t in owned]))
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight is \[50, 16\] in the checkpoint, \[49, 16\] in the model"):
        load_optimizer(root / "step_00000003", optimizer, ALONE)


def test_every_tensor_and_file_is_told_of(tmp_path: Path) -> None:
    """Or a rank that works on a large checkpoint would look like one that hangs."""
    world = World(0, 1, torch.device("cpu"))
    model, optimizer = trained(world)
    parts, moves = len(optimizer.owned), [world.activity.moves]
    path = writer(tmp_path, world).save(1, weight_of(model), optimizer, {"tokens": 1}).path
    moves.append(world.activity.moves)
    files = verify(path, world)["files"]
    moves.append(world.activity.moves)
    load_optimizer(path, optimizer, world)
    moves.append(world.activity.moves)
    saved, verified, loaded = (after - before for before, after in pairwise(moves))
    assert saved == parts + parts + 3 * parts + 2, "gathered; exported; masters with two moments; and the files of both are hashed"
    assert verified == len(files) and loaded == parts
