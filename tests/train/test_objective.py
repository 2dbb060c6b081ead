"""Weighted losses and losses against a teacher in whole runs: those of a plain loop over documents, on every grid, resumed exactly."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.checkpoint.hf import load_hf_weights
from megatron_ext.config.load import load_config
from megatron_ext.model.gpt import GPT
from megatron_ext.optim.adamw import AdamW, decay_groups
from megatron_ext.optim.schedules import learning_rate_factor
from megatron_ext.train.build import Setup, prepare
from tests.distributed import RankError, RunRanks
from tests.train.test_trainer import CHECKPOINTS, copy_of, same_tensors
from tests.train.tiny_run import losses, master_weights, records, train, write_run

RUN = {"train__dtype": "float64", "train__steps": 5, "checkpoint__keep_last": 9, "checkpoint__every": 2, "data__validation_fraction": 0.0}
SHARED = {"planning__policy": "adaptive", "planning__tokens_per_pack": 16, "checkpoint__every": None}
KL = {"weight": 0.7, "sources": ["code"]}
HIDDEN = {"weight": 0.5, "layers": [0, 1, 2], "kind": "mse"}
WEIGHTING = {"strategy": "linupper", "temperature": 0.4}


@pytest.fixture(scope="module")
def teacher(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of a short run with another seed."""
    folder = tmp_path_factory.mktemp("teacher")
    run_ranks(1, train, write_run(folder, seed=1, **RUN | {"train__steps": 3, "checkpoint__every": None}))
    return str(folder / CHECKPOINTS / "step_00000003")


def weighted_run(folder: Path, **changes: Any) -> Path:
    """A run whose first source has weights of documents and tokens."""
    config = write_run(folder, **RUN)
    setup = prepare(load_config(config, []))
    generator = np.random.default_rng(3)
    [prose, code] = setup.mixture.corpora
    np.save(folder / "documents.npy", generator.uniform(0, 2, len(prose)).astype(np.float32))
    np.save(folder / "tokens.npy", generator.uniform(0, 2, prose.dataset.num_tokens).astype(np.float32))
    files = {"document_weights": str(folder / "documents.npy"), "token_weights": str(folder / "tokens.npy")}
    sources = [{"name": "prose", "path": prose.path, "weight": 2.0, **files}, {"name": "code", "path": code.path}]
    return write_run(folder, **RUN | {"data__sources": sources} | changes)


def states(model: GPT, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
    """Hidden states as transformers counts them, and logits, of one document."""
    length = len(tokens)
    pack = model.context(torch.arange(length), torch.tensor([0, length], dtype=torch.int32), length)
    x = model.embed(tokens)
    found = [x]
    for block in model.model.layers.values():
        x = block(x, pack)
        found.append(x)
    found[-1] = model.model.norm(x)
    return found, found[-1] @ model.head_weight.T


def file_weights(setup: Setup, source: int, document: int, begin: int, end: int) -> Tensor:
    """Of the tokens ``begin`` to ``end`` of a document, read from the files by hand."""
    options = setup.config.data.sources[source]
    weights = np.ones(end - begin, dtype=np.float32)
    if options.document_weights is not None:
        first = int(setup.mixture.corpora[source].dataset.lengths[:document].sum())
        weights = np.load(options.token_weights)[first + begin : first + end] * np.load(options.document_weights)[document]
    return torch.from_numpy(weights).double()


def loss_weights(values: list[Tensor], options: Any) -> list[float]:
    """Equations of the paper: softmax over the documents of min(h + 1, 1) / r, with mean 1, rounded as packs carry them."""
    means = torch.stack([each.mean() for each in values])
    h = 2 * (means - means.min()) / (means.max() - means.min()) - 1
    weights = (torch.minimum(h + 1, torch.ones_like(h)) / options.temperature).exp()
    return (weights / weights.mean()).tolist()


def plain_run(config: Path) -> list[float]:
    """Losses of a run by a loop over documents in plain torch."""
    setup = prepare(load_config(config, []))
    options, names = setup.config, [corpus.name for corpus in setup.mixture.corpora]
    model, teacher = GPT(setup.model, "dense").double(), GPT(setup.model, "dense").double()
    model = GPT(setup.model, "dense")
    model.reset_parameters(options.seed)
    model.double()
    distillation = options.distillation
    if distillation is not None:
        load_hf_weights(teacher, distillation.teacher)
    rule = AdamW(decay_groups(model.named_parameters(), options.optimizer.weight_decay), lr=options.optimizer.lr)
    seen = []
    for step in range(1, setup.total_steps + 1):
        pieces = [piece for piece in setup.mixture.take(options.data.tokens_per_step) if piece.loss_tokens]
        total, rows = torch.zeros((), dtype=torch.float64), []
        for piece in pieces:
            end = piece.start + 1 + piece.loss_tokens
            read = torch.from_numpy(setup.mixture.corpora[piece.source].tokens(piece.document, piece.start, end).astype(np.int64))
            hidden, logits = states(model, read[:-1])
            rows.append((read, hidden, logits, F.cross_entropy(logits, read[1:], reduction="none")))
        factors = [1.0] * len(pieces)
        if options.loss_weighting is not None:
            factors = loss_weights([row[3].detach() for row in rows], options.loss_weighting)
        weights = [
            (file_weights(setup, p.source, p.document, p.start + 1, p.start + 1 + p.loss_tokens).float() * f).double()
            for p, f in zip(pieces, factors, strict=True)
        ]
        plain = sum(row[3] @ weight for row, weight in zip(rows, weights, strict=True))
        denominator = sum(weight.sum() for weight in weights)
        for piece, weight, (read, hidden, logits, _) in zip(pieces, weights, rows, strict=True):
            if distillation is None:
                break
            with torch.no_grad():
                their_hidden, their_logits = states(teacher, read[:-1])
            if distillation.kl is not None and names[piece.source] in (distillation.kl.sources or names):
                ours, theirs = logits.log_softmax(1), their_logits.log_softmax(1)
                divergence = (theirs.exp() * (theirs - ours)).sum(1) @ weight
                total = total + distillation.factor(step) * distillation.kl.weight * divergence
            for layer in distillation.hidden.layers if distillation.hidden is not None else ():
                x, y = hidden[layer], their_hidden[layer]
                distance = ((x - y) ** 2).mean(1) if distillation.hidden.kind == "mse" else 1 - F.cosine_similarity(x, y, dim=1)
                total = total + distillation.factor(step) * distillation.hidden.weight * (distance @ weight)
        seen.append(float(plain.detach() / denominator))
        rule.zero_grad()
        ((plain + total) / denominator).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.optimizer.clip_norm)
        for group in rule.param_groups:
            group["lr"] = options.optimizer.lr * learning_rate_factor(options.schedule, step, setup.total_steps)
        rule.step()
    return seen


def everything(folder: Path, teacher: str, **changes: Any) -> Path:
    distillation = {"teacher": teacher, "kl": KL, "hidden": HIDDEN, "decay_steps": 4}
    return weighted_run(folder, distillation=distillation, loss_weighting=WEIGHTING, **changes)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, teacher: str) -> dict[int, float]:
    """Of a plain loop with everything at once."""
    return dict(enumerate(plain_run(everything(tmp_path_factory.mktemp("plain"), teacher)), 1))


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {}),
        (2, SHARED),
        (2, {"parallel__tp": 2, "parallel__sequence_parallel_activations": True}),
        (4, {"parallel__tp": 2, "train__activation_checkpointing": "full", **SHARED}),
        (4, {"parallel__pp": 2, **SHARED}),
    ],
    ids=["alone", "shared", "tp2sp", "tp2-shared", "pp2-shared"],
)
def test_everything_at_once_equals_a_plain_loop(
    run_ranks: RunRanks, tmp_path: Path, teacher: str, expected: dict[int, float], ranks: int, changes: dict[str, object]
) -> None:
    run_ranks(ranks, train, everything(tmp_path, teacher, **changes))
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-10, abs=0)
    steps = records(tmp_path / "run", "train")
    assert all(("distillation_kl" in step) == (step["step"] <= 4) and "unweighted_loss" in step for step in steps)
    assert all(step["distillation_kl"] > 0 and step["distillation_hidden"] > 0 for step in steps[:4])


PARTS: dict[str, dict[str, Any]] = {
    "weights": {},
    "loss_weighting": {"loss_weighting": WEIGHTING},
    "kl": {"distillation": {"kl": KL | {"sources": None}}},
    "hidden": {"distillation": {"hidden": HIDDEN | {"kind": "cosine", "sources": None}}},
}


@pytest.mark.parametrize("part", PARTS)
def test_each_part_equals_a_plain_loop(run_ranks: RunRanks, tmp_path: Path, teacher: str, expected: dict[int, float], part: str) -> None:
    changes = {key: value | {"teacher": teacher} if key == "distillation" else value for key, value in PARTS[part].items()}
    config = weighted_run(tmp_path, **changes)
    run_ranks(1, train, config)
    found = losses(tmp_path / "run")
    assert found == pytest.approx(dict(enumerate(plain_run(config), 1)), rel=1e-10, abs=0)
    assert abs(found[5] / expected[5] - 1) > 1e-5, "all at once is something else"


def test_resume_is_bit_exact(run_ranks: RunRanks, tmp_path: Path, teacher: str) -> None:
    run_ranks(1, train, everything(tmp_path / "whole", teacher))
    copy_of(tmp_path / "whole", tmp_path / "parted", until=2)
    config = everything(tmp_path / "parted", teacher)
    run_ranks(1, train, config)
    assert losses(tmp_path / "parted/run") == losses(tmp_path / "whole/run")
    assert same_tensors(*(master_weights(tmp_path / name / CHECKPOINTS / "step_00000005") for name in ("parted", "whole")))


def test_what_weighs_nothing_leaves_every_bit(run_ranks: RunRanks, tmp_path: Path, teacher: str) -> None:
    small = RUN | {"train__dtype": "float32", "train__steps": 3}
    run_ranks(2, train, write_run(tmp_path / "plain", **small))
    np.save(tmp_path / "ones.npy", np.ones(60, dtype=np.float32))
    silent = {"teacher": teacher, "kl": {"weight": 0.0}, "hidden": {"weight": 0.0}}
    config = write_run(tmp_path / "silent", **small, distillation=silent, loss_weighting=WEIGHTING | {"from_step": 9})
    run_ranks(2, train, config, [f"data.sources.0.document_weights={tmp_path / 'ones.npy'}"])
    assert losses(tmp_path / "silent/run") == losses(tmp_path / "plain/run")
    assert same_tensors(*(master_weights(tmp_path / name / CHECKPOINTS / "step_00000003") for name in ("silent", "plain")))


def test_zero_distils_too(run_ranks: RunRanks, tmp_path: Path, teacher: str) -> None:
    changes = RUN | {"train__dtype": "float32", "train__steps": 3, "distillation": {"teacher": teacher, "kl": KL, "hidden": HIDDEN}}
    run_ranks(1, train, write_run(tmp_path / "alone", **changes))
    run_ranks(2, train, write_run(tmp_path / "zero", optimizer__sharding="zero2", **changes))
    assert losses(tmp_path / "zero/run") == pytest.approx(losses(tmp_path / "alone/run"), rel=2e-5, abs=0)
    plain = write_run(tmp_path / "plain", **changes | {"distillation": None})
    run_ranks(1, train, plain)
    assert abs(losses(tmp_path / "plain/run")[3] / losses(tmp_path / "alone/run")[3] - 1) > 1e-4, "the teacher matters"


def test_another_teacher_is_refused_at_resume(run_ranks: RunRanks, tmp_path: Path, teacher: str) -> None:
    run_ranks(1, train, write_run(tmp_path, **RUN, distillation={"teacher": teacher, "kl": KL}), ["train.steps=3"])
    other = str(tmp_path / CHECKPOINTS / "step_00000002")
    config = write_run(tmp_path, **RUN, distillation={"teacher": other, "kl": KL})
    with pytest.raises(RankError, match=r"teacher changed since the checkpoint.*checkpoint\.allow_changed_data=true"):
        run_ranks(1, train, config)
    run_ranks(1, train, config, ["checkpoint.allow_changed_data=true"])
    assert max(losses(tmp_path / "run")) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__vocab_size": 60}, r"vocab_size: 64; accepted: that of the model, 60"),
        ({"model__num_layers": 3}, r"hidden_size and num_layers: \(32, 2\); accepted: with hidden those of the model, \(32, 3\)"),
        ({"distillation__kl__sources": ["poems"]}, r"sources: \"kl.sources 'poems'\"; accepted: 'prose, code'|poems"),
        ({"data__sequence_length": 200, "data__tokens_per_step": 400}, "max_position: 32; accepted: at least the 200 tokens"),
        ({"distillation__hidden__layers": [3]}, "hidden.layers: 3; accepted: at most the 2 layers of the model"),
    ],
    ids=["vocabulary", "depth", "sources", "length", "layers"],
)
def test_a_teacher_that_does_not_fit_is_refused(tmp_path: Path, teacher: str, changes: dict[str, Any], message: str) -> None:
    distillation = {"distillation": {"teacher": teacher, "kl": dict(KL), "hidden": dict(HIDDEN)}}
    with pytest.raises(ValueError, match=message):
        prepare(load_config(write_run(tmp_path, **RUN | distillation | changes), []))
