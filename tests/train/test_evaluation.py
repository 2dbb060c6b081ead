"""Evaluation by packs on many ranks against a plain computation over single documents by transformers."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_ext.checkpoint.hf_config import config_to_hf
from megatron_ext.config import deepspeed_config, load_config
from megatron_ext.data.corpus import Corpus
from megatron_ext.data.mixture import Mixture
from megatron_ext.data.options import DataOptions, SourceOptions
from megatron_ext.data.validation import ValidationSet, validation_sets
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.parallel.world import World
from megatron_ext.planning import CostModel
from megatron_ext.planning.worker import PlanSettings
from megatron_ext.train.engine import owner_engine
from megatron_ext.train.evaluation import EvaluationResult, evaluate, evaluate_alone
from megatron_ext.train.evaluation_packs import evaluation_packs
from megatron_ext.train.step_plans import StepPlanner
from tests.distributed import RunRanks
from tests.grids import data_grid, owner_optimizer
from tests.train.tiny_run import VOCAB, random_documents, records, train, write_corpus, write_run

CONFIG = ModelConfig(VOCAB, 16, 24, 2, 4, 2, 4, 64, init_std=0.3)
SEQUENCE = 32
BUCKETS = [3, 10, 40]


def sets_at(folder: Path) -> list[ValidationSet]:
    train, own = (SourceOptions(name, str(folder / name)) for name in ("train", "own"))
    data = DataOptions([train], SEQUENCE, 64, validation=[own], validation_fraction=0.3)
    return validation_sets(data, [Corpus(train, 0.3)], 400)


def model_of(seed: int) -> GPT:
    model = GPT(CONFIG, "sdpa")
    model.reset_parameters(seed)
    return model


def evaluate_on(world: World, folder: Path, tokens_per_pack: int) -> list[EvaluationResult]:
    model = model_of(1)
    optimizer = owner_optimizer(model.named_parameters(), lambda owned: torch.optim.SGD([tensor for _, tensor in owned]), world)
    engine = owner_engine(model, optimizer, data_grid(world), deepspeed_config(load_config(folder / "config.yaml"), world.size), 1)
    sets = sets_at(folder)
    settings = PlanSettings(world.size, "data_parallel")
    mixture = Mixture([each.corpus for each in sets], [1.0] * len(sets), 0, 100)
    planner = StepPlanner(settings, CostModel(tokens_per_pack), engine.grid, mixture, 100, ahead=0)
    results = evaluate(engine, sets, planner, VOCAB, BUCKETS)
    assert evaluate(engine, [], planner, VOCAB) == []
    assert [each.loss for each in evaluate(engine, sets, planner, VOCAB)] == pytest.approx([each.loss for each in results], rel=1e-12)
    engine.close()
    assert all(parameter.grad is None for parameter in model.parameters())
    return results


@torch.no_grad()
def plainly(each: ValidationSet) -> list[list[float]]:
    """Token losses over the pieces of a set, one at a time, by the bucket of their positions."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_to_hf(CONFIG, dtype="float32")))
    model.load_state_dict(model_of(1).state_dict())
    losses: list[list[float]] = [[] for _ in range(len(BUCKETS) + 1)]
    for piece in each.pieces:
        ids = torch.from_numpy(each.corpus.dataset.tokens(piece.document)[piece.start : piece.stop + piece.has_next].astype("int64"))
        logits = model(input_ids=ids[None, : len(piece)]).logits[0, : len(ids) - 1]
        for position, loss in enumerate(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").tolist()):
            losses[sum(position >= edge for edge in BUCKETS)].append(loss)
    return losses


def check(result: EvaluationResult, losses: list[list[float]]) -> None:
    flat = [loss for bucket in losses for loss in bucket]
    assert result.tokens == len(flat) and result.loss == pytest.approx(sum(flat) / len(flat), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(sum(flat) / len(flat)), rel=1e-4)
    found = [(each.start, each.stop, each.tokens) for each in result.by_position]
    assert found == [(0, 3, len(losses[0])), (3, 10, len(losses[1])), (10, 40, len(losses[2]))], "no position reaches the last bucket"
    means = [sum(bucket) / len(bucket) for bucket in losses if bucket]
    assert [each.loss for each in result.by_position] == pytest.approx(means, rel=1e-5)
    assert max(means) - min(means) > 1e-2


@pytest.mark.parametrize(("ranks", "tokens_per_pack"), [(1, 32), (2, 100)])
def test_equals_a_plain_computation(run_ranks: RunRanks, tmp_path: Path, ranks: int, tokens_per_pack: int) -> None:
    write_run(tmp_path)
    for seed, name in enumerate(("train", "own")):
        write_corpus(tmp_path / name, random_documents(60, 100, seed=seed))
    expected = [plainly(each) for each in sets_at(tmp_path)]
    for results in run_ranks(ranks, evaluate_on, tmp_path, tokens_per_pack):
        assert [(each.source, each.split) for each in results] == [("own", "validation"), ("train", "held_out")]
        for result, losses in zip(results, expected, strict=True):
            check(result, losses)


def test_one_process_without_a_run_finds_the_same(tmp_path: Path) -> None:
    write_corpus(tmp_path / "own", random_documents(60, 100, seed=1))
    [chosen] = validation_sets(
        DataOptions([SourceOptions("unused", "unused")], SEQUENCE, 64, validation=[SourceOptions("own", str(tmp_path / "own"))]), [], 400
    )
    packs = evaluation_packs(str(tmp_path / "own"), tmp_path, SEQUENCE, 400, VOCAB)
    check(evaluate_alone(model_of(1), "own", packs, BUCKETS), plainly(chosen))


def test_a_run_says_at_its_end_what_it_forgot(run_ranks: RunRanks, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    changes = {"optimizer__lr": 0.05, "train__steps": 4, "evaluation__every": 1, "data__validation_fraction": 0.2}
    prose = write_corpus(tmp_path / "old", [document[::-1] for document in random_documents(60, 40, seed=3)])
    replay = {"share": 0.25, "sources": [{"name": "old prose", "path": prose}]}
    run_ranks(2, train, write_run(tmp_path, **changes, data__replay=replay))
    lines = [line for line in capfd.readouterr().out.splitlines() if " at the start, " in line]
    curve = [record["loss"] for record in records(tmp_path / "run", "eval") if record["source"] == "old prose"]
    assert [line.split(":")[0] for line in lines] == ["prose (new)", "code (new)", "old prose (old)"] and len(curve) == 5
    assert lines[2].startswith(f"old prose (old): loss {curve[0]:.3f} at the start") and lines[2].endswith(
        f"in the end {curve[-1] - curve[0]:+.3f}"
    )
