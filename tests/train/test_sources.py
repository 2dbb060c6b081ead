"""Replay of earlier mixtures, also of one that replays another."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config import load_config
from megatron_ext.errors import ConfigError
from megatron_ext.train.sources import build_mixture, training_shares
from tests.train.tiny_run import random_documents, write_corpus, write_run


def run_of(folder: Path, names: list[str], **changes: Any) -> Path:
    """A run that has begun: its directory holds its configuration. Sources weigh 1, 2, 3 ..."""
    folder.mkdir()
    sources = [
        {"name": name, "path": write_corpus(folder / name, random_documents(40, 30, seed=len(name))), "weight": float(weight)}
        for weight, name in enumerate(names, start=1)
    ]
    config = write_run(folder, data__sources=sources, **changes)
    (folder / "run").mkdir()
    shutil.copy(config, folder / "run" / "config.yaml")
    return folder / "run"


def shares_of(run: Path) -> dict[str, float]:
    return {each.source.name: each.share for each in training_shares(load_config(run / "config.yaml").data)}


def test_without_replay_shares_are_the_weights(tmp_path: Path) -> None:
    assert shares_of(run_of(tmp_path / "a", ["x", "y"])) == pytest.approx({"x": 1 / 3, "y": 2 / 3})


def test_replay_of_listed_sources(tmp_path: Path) -> None:
    old = [{"name": "old", "path": "old"}, {"name": "older", "path": "older", "weight": 3.0}]
    run = run_of(tmp_path / "a", ["x", "y"], data__replay={"share": 0.2, "sources": old})
    assert shares_of(run) == pytest.approx({"x": 0.8 / 3, "y": 1.6 / 3, "old": 0.05, "older": 0.15})


def test_replay_of_a_run_that_replays_a_run(tmp_path: Path) -> None:
    first = run_of(tmp_path / "first", ["x", "y"], data__validation_fraction=0.25)
    second = run_of(tmp_path / "second", ["z"], data__replay={"share": 0.5, "run": str(first)}, data__validation_fraction=0.0)
    third = run_of(tmp_path / "third", ["w"], data__replay={"share": 0.2, "run": str(second)}, data__validation_fraction=0.1)
    assert shares_of(third) == pytest.approx({"w": 0.8, "z": 0.1, "x": 0.1 / 3, "y": 0.2 / 3})
    held_out = {each.source.name: each.held_out for each in training_shares(load_config(third / "config.yaml").data)}
    assert held_out == {"w": 0.1, "z": 0.1, "x": 0.25, "y": 0.25}, "what an earlier run held out stays held out"


def test_no_replayed_document_was_held_out_by_the_earlier_run(tmp_path: Path) -> None:
    first = run_of(tmp_path / "first", ["x"], data__validation_fraction=0.4)
    second = run_of(tmp_path / "second", ["z"], data__replay={"share": 0.5, "run": str(first)}, data__validation_fraction=0.0)
    earlier = build_mixture(load_config(first / "config.yaml")).corpora[0]
    mixture = build_mixture(load_config(second / "config.yaml"))
    taken = [piece for _ in range(30) for piece in mixture.take(256)]
    replayed = {piece.document for piece in taken if mixture.corpora[piece.source].name == "x"}
    assert replayed == {d for d in range(len(earlier)) if not earlier.is_held_out(d)} and len(replayed) < len(earlier)
    tokens = [sum(len(piece) for piece in taken if piece.source == source) for source in (0, 1)]
    assert abs(tokens[0] - tokens[1]) <= 2 * 32


def test_a_name_that_is_new_and_replayed_is_refused(tmp_path: Path) -> None:
    first = run_of(tmp_path / "first", ["x"])
    second = run_of(tmp_path / "second", ["x"], data__replay={"share": 0.5, "run": str(first)})
    with pytest.raises(ConfigError, match=r"data\.replay: source 'x' is replayed and also new"):
        shares_of(second)


def test_a_run_that_replays_itself_is_refused(tmp_path: Path) -> None:
    first = run_of(tmp_path / "first", ["x"], data__replay={"share": 0.5, "run": str(tmp_path / "second" / "run")})
    second = run_of(tmp_path / "second", ["y"], data__replay={"share": 0.5, "run": str(first)})
    with pytest.raises(ConfigError, match="replays itself"):
        shares_of(second)


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path / "first", ["x"], data__replay={"share": 0.5, "run": str(tmp_path)})
    with pytest.raises(
        ConfigError, match=r"data\.replay\.run is .* where there is no config\.yaml; accepted: the directory of an earlier run"
    ):
        shares_of(run)
