"""Steps that are not finite on one rank, and spikes, on every engine: nothing of them is left, on any rank."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext.errors import TrainingError
from tests.distributed import RankError, RunRanks
from tests.train.bad_steps import pieces_of_steps, train_badly
from tests.train.tiny_run import VOCAB, losses, master_weights, random_documents, records, train, write_corpus, write_run

MER = {"optimizer__meta_experience_replay": {"every": 2, "factor": 0.5}}
ENGINES = {
    "plain": (2, ["checkpoint.keep_last=9"], MER),
    "plain bf16": (2, ["train.dtype=bfloat16"], {"optimizer__rule": "muon"}),
    "pipeline": (2, ["parallel.pp=2"], MER),
    "tensor": (2, ["parallel.tp=2"], {"optimizer__qk_clip": 1.0}),
    "zero1": (2, ["optimizer.sharding=zero1"], {}),
    "zero1 bf16": (2, ["optimizer.sharding=zero1", "train.dtype=bfloat16"], {}),
    "zero2 bf16": (2, ["optimizer.sharding=zero2", "train.dtype=bfloat16"], {}),
    "zero2": (2, ["optimizer.sharding=zero2"], {}),
    "zero3": (2, ["optimizer.sharding=zero3"], {}),
}
BAD = 3


def checkpoint(folder: Path, step: int) -> Path:
    return folder / f"run/checkpoints/step_{step:08d}"


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("engine", ENGINES)
def test_one_bad_rank_skips_the_update_on_all(run_ranks: RunRanks, tmp_path: Path, engine: str) -> None:
    """Of the state nothing changes, and what follows is what follows when the update is simply not taken."""
    ranks, overrides, changes = ENGINES[engine]
    options = {"train__steps": 5, "checkpoint__every": 1, "checkpoint__keep_last": 9, "evaluation__tokens": 64, **changes}
    configs = {name: write_run(tmp_path / name, **options) for name in ("poisoned", "refused")}
    poisoned = pieces_of_steps(configs["poisoned"], overrides, BAD, BAD)
    run_ranks(ranks, train_badly, configs["poisoned"], overrides, poisoned)
    run_ranks(ranks, train_badly, configs["refused"], overrides, (), (BAD,))
    seen = [master_weights(checkpoint(tmp_path / "poisoned", step)) for step in range(1, 6)]
    assert same(seen[BAD - 1], seen[BAD - 2]), "the bad step left the state as it was"
    assert not same(seen[1], seen[0]) and not same(seen[BAD], seen[BAD - 1]) and all(v.isfinite().all() for v in seen[-1].values())
    assert same(seen[-1], master_weights(checkpoint(tmp_path / "refused", 5)))
    assert losses(tmp_path / "poisoned/run") == losses(tmp_path / "refused/run")
    states = [json.loads((checkpoint(tmp_path / "poisoned", step) / "trainer_state.json").read_text()) for step in (BAD - 1, BAD)]
    assert [state["updates"] for state in states] == [BAD - 1, BAD - 1]
    assert [state["guard"]["skipped"] for state in states] == [0, 1] and states[0]["guard"]["window"] == states[1]["guard"]["window"]
    record = records(tmp_path / "poisoned/run", "train")[BAD - 1]
    assert record["skipped_steps"] == 1 and record["skipped_by_reason"] == {"non_finite": 1}
    assert np.isfinite(record["loss"]) and not np.isfinite(record["grad_norm"])


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    """Events, in whichever file a run writes them."""
    lines = [line for path in sorted((folder / "run").glob("*.jsonl")) for line in path.read_text("utf-8").splitlines()]
    return [record for record in map(json.loads, lines) if record.get("event") == name]


def spiky_run(folder: Path) -> Path:
    """Among documents of common tokens is one, as long as a step, of a token that is rare elsewhere."""
    options = {"data__sequence_length": 256, "data__validation_fraction": 0.0, "train__steps": 12, "train__dtype": "float64"}
    config = write_run(folder, **options, checkpoint__every=8)
    documents = [*random_documents(150, 60, seed=1), np.full(240, VOCAB - 2, dtype=np.uint16)]
    write_corpus(folder / "prose", documents)
    return config


@pytest.mark.parametrize(("key", "k"), [("loss_deviations", 4), ("grad_norm_deviations", 8)])
def test_a_spike_is_not_learned_from_on_any_grid(run_ranks: RunRanks, tmp_path: Path, key: str, k: int) -> None:
    order = ["seed=1", "data.sources.0.weight=8.0"]
    overrides = [f"train.skip.{key}={k}", "train.skip.window=16", "train.skip.min_steps=4", *order]
    found = []
    for ranks, grid in ((1, []), (2, []), (2, ["parallel.pp=2"]))[: 3 if key == "loss_deviations" else 2]:
        folder = tmp_path / f"{ranks}{grid}"
        run_ranks(ranks, train, spiky_run(folder), [*overrides, *grid])
        found.append([(event["step"], event["reasons"], event["documents"]) for event in events(folder, "skip")])
    assert found[0] and all(each == found[0] for each in found), "every grid skips the same steps"
    skipped = {document for _, reasons, documents in found[0] for document, *_ in documents["prose"]}
    assert 150 in skipped and {reason for _, reasons, _ in found[0] for reason in reasons} == {key.replace("deviations", "spike")}
    off = spiky_run(tmp_path / "off")
    run_ranks(1, train, off, order)
    assert not events(tmp_path / "off", "skip")


def test_too_many_bad_steps_stop_the_run_with_their_numbers(run_ranks: RunRanks, tmp_path: Path) -> None:
    config = write_run(tmp_path, train__steps=9)
    with pytest.raises(RankError, match=rf"{TrainingError.__name__}: skipped 3 steps in a row .*step 4 \(non_finite.*step 5 .*step 6"):
        run_ranks(2, train_badly, config, ["train.skip.most_consecutive=3"], (), (4, 5, 6, 7, 8))
    assert [record["step"] for record in records(tmp_path / "run", "train")] == [1, 2, 3, 4, 5, 6]
