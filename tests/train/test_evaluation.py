"""Evaluation by packs on many ranks against a plain computation over single documents by transformers."""

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
from megatron_ext.train.evaluation import EvaluationResult, evaluate
from megatron_ext.train.step_plans import StepPlanner
from tests.distributed import RunRanks
from tests.grids import data_grid, owner_optimizer
from tests.train.tiny_run import VOCAB, random_documents, write_corpus, write_run

CONFIG = ModelConfig(VOCAB, 16, 24, 2, 4, 2, 4, 64, init_std=0.3)
SEQUENCE = 32


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
    results = evaluate(engine, sets, planner, VOCAB)
    assert evaluate(engine, [], planner, VOCAB) == []
    engine.close()
    assert all(parameter.grad is None for parameter in model.parameters())
    return results


@torch.no_grad()
def plainly(each: ValidationSet) -> tuple[float, int]:
    """Mean token loss over the pieces of a set, one at a time."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_to_hf(CONFIG, dtype="float32")))
    model.load_state_dict(model_of(1).state_dict())
    total, tokens = 0.0, 0
    for piece in each.pieces:
        ids = torch.from_numpy(each.corpus.dataset.tokens(piece.document)[piece.start : piece.stop + piece.has_next].astype("int64"))
        logits = model(input_ids=ids[None, : len(piece)]).logits[0, : len(ids) - 1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
        tokens += len(ids) - 1
    return total / tokens, tokens


@pytest.mark.parametrize(("ranks", "tokens_per_pack"), [(1, 32), (2, 100)])
def test_equals_a_plain_computation(run_ranks: RunRanks, tmp_path: Path, ranks: int, tokens_per_pack: int) -> None:
    write_run(tmp_path)
    for seed, name in enumerate(("train", "own")):
        write_corpus(tmp_path / name, random_documents(60, 100, seed=seed))
    expected = [plainly(each) for each in sets_at(tmp_path)]
    for results in run_ranks(ranks, evaluate_on, tmp_path, tokens_per_pack):
        assert [(each.source, each.split) for each in results] == [("own", "validation"), ("train", "held_out")]
        assert [each.tokens for each in results] == [tokens for _, tokens in expected]
        assert [each.loss for each in results] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
