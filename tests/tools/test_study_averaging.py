"""Averages of the last checkpoints of a study's runs, against transformers with the mean of the weights."""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_ext.config.study import Study, StudyRun, plan_runs, read_study
from megatron_ext.data.validation import validation_sets
from megatron_ext.errors import CheckpointError
from megatron_ext.report.study import Variant
from tests.report.test_study import fake, losses_to
from tests.tools.test_study import write_study
from tests.train.tiny_run import VOCAB, random_documents, write_corpus

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LAST = 3


@pytest.fixture
def averaging(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """tools/study_averaging.py."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools")
    yield import_module("study_averaging")


def finished(folder: Path, checkpoints: int, *more: str) -> tuple[Study, StudyRun, Variant, list[LlamaForCausalLM]]:
    """A study of one run with checkpoints of random models, oldest first."""
    valid = write_corpus(folder / "valid", random_documents(12, 30, seed=3))
    overrides = [
        f"checkpoint.keep_last={LAST}",
        f"data.validation=[{{name: held out, path: {valid}}}]",
        "data.validation_fraction=0",
        *more,
    ]
    path = write_study(folder, overrides=overrides, averaging={"last": LAST}, variants={"plain": {}}, seeds=[1])
    study = read_study(path)
    [run] = plan_runs(path, study, folder / "out")
    variant, models = Variant("plain", None, {}, {1: fake(run.directory, losses_to(5.0), begin=0.0)}), []
    for number in range(checkpoints):
        torch.manual_seed(number)
        models.append(LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **SHAPE, initializer_range=0.3)))
        models[-1].save_pretrained(run.directory / "checkpoints" / f"step_{4 * number:08d}")
    return study, run, variant, models


@torch.no_grad()
def loss_of_mean(models: list[LlamaForCausalLM], documents: list[np.ndarray]) -> float:
    """Each document alone, through a model with the mean of the weights."""
    state = {name: torch.stack([model.state_dict()[name] for model in models]).mean(0) for name in models[0].state_dict()}
    models[0].load_state_dict(state)
    total, count = 0.0, 0
    for document in documents:
        tokens = torch.tensor(document.astype("int64"))
        total += float(F.cross_entropy(models[0](tokens[None]).logits[0, :-1], tokens[1:], reduction="sum")) if len(tokens) > 1 else 0.0
        count += len(tokens) - 1
    return total / count


def test_the_last_checkpoints_are_averaged_and_no_others(tmp_path: Path, averaging: ModuleType) -> None:
    study, run, variant, models = finished(tmp_path, LAST + 1)
    assert study.averaging is not None
    averaging.average_runs(study.averaging, [run], [variant], Console(quiet=True))
    written = run.directory / "averages.json"
    losses = json.loads(written.read_text())["losses"]
    last = models[-1].state_dict()["model.norm.weight"].clone()
    documents = random_documents(12, 30, seed=3)
    expected = loss_of_mean(models[1:], documents)
    assert losses == {"held out": pytest.approx(expected, rel=1e-5)} and torch.equal(last, models[-1].state_dict()["model.norm.weight"])
    assert abs(losses["held out"] - loss_of_mean(models[-1:], documents)) > 0.1  # the last alone
    made = written.stat().st_mtime_ns
    averaging.average_runs(study.averaging, [run], [variant], Console(quiet=True))
    assert written.stat().st_mtime_ns == made


def test_the_documents_are_those_that_the_run_evaluates(tmp_path: Path, averaging: ModuleType) -> None:
    study, run, variant, models = finished(tmp_path, LAST, "evaluation.tokens=60")
    assert study.averaging is not None
    averaging.average_runs(study.averaging, [run], [variant], Console(quiet=True))
    [evaluated] = validation_sets(run.config.data, [], 60)
    documents = [evaluated.corpus.tokens(piece.document, piece.start, piece.stop) for piece in evaluated.pieces]
    losses = json.loads((run.directory / "averages.json").read_text())["losses"]
    assert 1 < len(documents) < 12 and losses["held out"] == pytest.approx(loss_of_mean(models, documents), rel=1e-5)


def test_too_few_checkpoints_are_an_error(tmp_path: Path, averaging: ModuleType) -> None:
    study, run, variant, _ = finished(tmp_path, LAST - 1)
    assert study.averaging is not None
    with pytest.raises(CheckpointError, match=rf"2 checkpoints; accepted: averaging\.last \({LAST}\) or more"):
        averaging.average_runs(study.averaging, [run], [variant], Console(quiet=True))
