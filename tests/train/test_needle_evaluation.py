"""Needles in whole runs: what transformers finds with the same weights, on every grid, without a change of what is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_ext.data.corpus import Corpus
from megatron_ext.data.needle import Haystack, Needle
from megatron_ext.data.options import DataOptions, SourceOptions
from megatron_ext.data.validation import validation_sets
from tests.distributed import RankError, RunRanks
from tests.train.tiny_run import losses, records, train, write_run

LENGTHS, DEPTHS, SAMPLES = [8, 33], [0.0, 0.3, 1.0], 40
NEEDLES = {"lengths": LENGTHS, "depths": DEPTHS, "samples": SAMPLES, "key_tokens": 2, "value_tokens": 1, "seed": 3}
RUN = {"train__dtype": "float64", "train__steps": 3, "train__activation_checkpointing": "none", "planning__tokens_per_pack": 96}
ASKED = {**RUN, "evaluation__needle": NEEDLES, "evaluation__tokens": 96}
"""Values of one token and many samples: a model that knows little finds some by chance."""


def run(run_ranks: RunRanks, folder: Path, ranks: int, **changes: Any) -> list[dict[str, Any]]:
    run_ranks(ranks, train, write_run(folder, **{**ASKED, **changes}))
    return records(folder / "run", "needle")


@pytest.fixture(scope="module")
def alone(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run(run_ranks, folder, 1)
    return folder


@torch.no_grad()
def by_transformers(folder: Path, step: int) -> tuple[list[list[float]], list[list[float]]]:
    """Exact matches and log-probabilities, one document at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder / f"run/checkpoints/step_{step:08d}", dtype=torch.float64)
    sources = [SourceOptions(name, str(folder / name)) for name in ("prose", "code")]
    held_out = [Corpus(source, 0.1) for source in sources]
    haystack = Haystack.of(validation_sets(DataOptions(sources, 32, 256), held_out, 96))
    exact: list[list[float]] = []
    log_probability: list[list[float]] = []
    for length in LENGTHS:
        exact.append([])
        log_probability.append([])
        for depth in DEPTHS:
            documents = [torch.from_numpy(Needle(haystack, length, depth, i, 2, 1, 3).tokens(0, 0, length)) for i in range(SAMPLES)]
            scores = [model(document[None, :-1]).logits[0, -1].log_softmax(0) for document in documents]
            exact[-1].append(sum(int(s.argmax() == d[-1]) for s, d in zip(scores, documents, strict=True)) / SAMPLES)
            log_probability[-1].append(sum(float(s[d[-1]]) for s, d in zip(scores, documents, strict=True)) / SAMPLES)
    return exact, log_probability


def test_transformers_finds_the_same(alone: Path) -> None:
    found = records(alone / "run", "needle")
    assert [record["step"] for record in found] == [0, 3]
    exact, log_probability = by_transformers(alone, 3)
    assert found[1]["exact"] == exact and sum(map(sum, exact)) > 0
    for mine, theirs in zip(found[1]["log_probability"], log_probability, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert found[0]["log_probability"] != found[1]["log_probability"]


def test_training_and_losses_do_not_notice(run_ranks: RunRanks, alone: Path, tmp_path: Path) -> None:
    run_ranks(1, train, write_run(tmp_path, **RUN, evaluation__tokens=96, evaluation__position_buckets=[]))
    assert records(tmp_path / "run", "needle") == [] and losses(tmp_path / "run") == losses(alone / "run")
    plain, split = (records(folder / "run", "eval") for folder in (tmp_path, alone))
    assert [record["loss"] for record in plain] == [record["loss"] for record in split], "short documents are in the first bucket alone"
    assert "by_position" not in plain[0] and len(split[0]["by_position"]) == 1


GRIDS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "tp2": (2, {"parallel__tp": 2}),
    "tp4-tokens": (4, {"parallel__tp": 4, "parallel__sequence_parallel_activations": True}),
    "pp2": (2, {"parallel__pp": 2}),
    "pp2tp2": (4, {"parallel__pp": 2, "parallel__tp": 2, "model__tie_embeddings": False}),
    "shared": (2, {"planning__policy": "static", "planning__degree": 2, "planning__tokens_per_pack": 16}),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_finds_the_same(run_ranks: RunRanks, tmp_path: Path, alone: Path, grid: str) -> None:
    ranks, changes = GRIDS[grid]
    found = run(run_ranks, tmp_path, ranks, **changes, evaluation__position_buckets=[2, 9])
    for record, wanted in zip(found, records(alone / "run", "needle"), strict=True):
        assert record["exact"] == wanted["exact"]
        for row, expected in zip(record["log_probability"], wanted["log_probability"], strict=True):
            assert row == pytest.approx(expected, rel=1e-10)
    for record, wanted in zip(records(tmp_path / "run", "eval"), records(alone / "run", "eval"), strict=True):
        assert record["loss"] == pytest.approx(wanted["loss"], rel=1e-10)
        buckets = record["by_position"]
        assert [bucket["start"] for bucket in buckets] == [0, 2, 9] and sum(bucket["tokens"] for bucket in buckets) == wanted["eval_tokens"]


def test_rings_find_the_same(run_ranks: RunRanks, tmp_path: Path) -> None:
    one_head = {"model__num_heads": 1, "model__num_kv_heads": 1, "train__steps": 2}
    shared = {"planning__policy": "adaptive", "planning__largest_degree": 2, "planning__tokens_per_pack": 16}
    [_, wanted] = run(run_ranks, tmp_path / "alone", 1, **one_head)
    [_, found] = run(run_ranks, tmp_path / "ring", 2, **one_head, **shared)
    assert any(pack[2] == 2 for plan in records(tmp_path / "ring/run", "plan") for pack in plan["packs"])
    assert found["exact"] == wanted["exact"]
    assert found["log_probability"][1] == pytest.approx(wanted["log_probability"][1], rel=1e-10)


def test_zero_finds_the_same_in_float32(run_ranks: RunRanks, tmp_path: Path, alone: Path) -> None:
    found = run(run_ranks, tmp_path, 2, optimizer__sharding="zero3", train__dtype="float32")
    wanted = records(alone / "run", "needle")
    assert found[0]["exact"] == wanted[0]["exact"]
    assert found[0]["log_probability"][0] == pytest.approx(wanted[0]["log_probability"][0], rel=1e-5)


def test_needles_are_asked_for_at_their_own_steps(run_ranks: RunRanks, tmp_path: Path) -> None:
    few = {**NEEDLES, "samples": 1, "every": 2}
    found = run(run_ranks, tmp_path, 1, evaluation__needle=few, train__steps=5, evaluation__every=5)
    assert [record["step"] for record in found] == [0, 2, 4, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"planning__tokens_per_pack": 32, "evaluation__needle": {"lengths": [20, 34]}}, "lengths has 34; accepted: at most 33"),
        ({"data__validation_fraction": 0.0}, "needs text to hide needles in; accepted with data.validation"),
    ],
)
def test_what_cannot_be_asked_is_refused(run_ranks: RunRanks, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RankError, match=message):
        run(run_ranks, tmp_path, 1, **changes)
