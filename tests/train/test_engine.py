"""A step by packs, through DeepSpeed and the owner optimizer, against the sum over single documents in one process."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_ext.checkpoint.hf_config import config_to_hf
from megatron_ext.config import deepspeed_config, load_config
from megatron_ext.data.batch import PackedBatch, read_pack
from megatron_ext.data.corpus import Corpus, Piece, cut
from megatron_ext.data.options import SourceOptions
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.optim.adamw import AdamW, decay_groups
from megatron_ext.optim.options import OptimizerOptions
from megatron_ext.optim.sharded import ShardedOptimizer
from megatron_ext.parallel.world import World
from megatron_ext.planning import CostModel, Plan, plan_step
from megatron_ext.train.build import build_optimizer
from megatron_ext.train.engine import Engine, StepResult, owner_engine
from tests.distributed import RunRanks
from tests.grids import data_grid, owner_optimizer
from tests.train.tiny_run import VOCAB, random_documents, write_corpus, write_run

MODEL = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_position=64,
    init_std=0.2,
)
SEQUENCE = 48
TENSORS = dict[str, torch.Tensor]


class RecordingRule(torch.optim.SGD):
    """Keeps the gradients that the owner sees and changes nothing."""

    def __init__(self, owned: list[tuple[str, torch.Tensor]]) -> None:
        super().__init__([master for _, master in owned], lr=0.0)
        self.masters = [master for _, master in owned]
        self.seen: list[torch.Tensor] = []

    def step(self, closure: None = None) -> None:
        self.seen = [master.grad.clone() for master in self.masters]


def build(dtype: torch.dtype, tied: bool = False) -> GPT:
    model = GPT(replace(MODEL, tie_embeddings=tied), "sdpa")
    model.reset_parameters(seed=3)
    return model.to(dtype)


def corpus_at(prefix: str) -> Corpus:
    return Corpus(SourceOptions("tiny", prefix))


def pieces_of(corpus: Corpus) -> list[Piece]:
    return [piece for d in range(len(corpus)) for piece in cut(0, d, corpus.length(d), SEQUENCE)]


def engine_of(world: World, model: GPT, optimizer: ShardedOptimizer, corpus: Corpus, num_sources: int = 1) -> Engine:
    config = load_config(Path(corpus.path).with_name("config.yaml"))
    return owner_engine(model, optimizer, data_grid(world), deepspeed_config(config, world.size), num_sources)


def step_by(engine: Engine, world: World, plan: Plan, pieces: list[Piece], corpus: Corpus) -> StepResult:
    packs = [read_pack(pack, pieces, [corpus], VOCAB) for pack in plan.packs_of(world.rank)]
    return engine.step(packs, sum(piece.loss_tokens for piece in pieces), torch.zeros(1, dtype=torch.float64))


def gradients_by_packs(
    world: World, prefix: str, dtype: torch.dtype, tokens_per_pack: int, tied: bool
) -> tuple[float, list[tuple[str, int, torch.Tensor]]]:
    """Loss, and the gradients that this rank owns, of one step over the whole corpus."""
    corpus = corpus_at(prefix)
    pieces = pieces_of(corpus)
    model = build(dtype, tied)
    optimizer = owner_optimizer(model.named_parameters(), RecordingRule, world)
    engine = engine_of(world, model, optimizer, corpus)
    result = step_by(engine, world, plan_step([len(p) for p in pieces], world.size, CostModel(tokens_per_pack)), pieces, corpus)
    engine.close()
    return result.loss, [
        (o.part.name, o.part.box[0][0], seen) for o, seen in zip(optimizer.owned, optimizer.rules["adamw"].seen, strict=True)
    ]


def whole(parts: list[list[tuple[str, int, torch.Tensor]]]) -> TENSORS:
    """Gradients by name from the rows of all ranks."""
    rows: dict[str, dict[int, torch.Tensor]] = {}
    for name, begin, gradient in (entry for part in parts for entry in part):
        rows.setdefault(name, {})[begin] = gradient
    return {name: torch.cat([blocks[begin] for begin in sorted(blocks)]) for name, blocks in rows.items()}


def alone(piece: Piece, corpus: Corpus) -> PackedBatch:
    """A pack of one piece, made without a plan."""
    tokens = torch.from_numpy(corpus.tokens(piece.document, piece.start, piece.stop + piece.has_next).astype("int64"))
    size = len(piece)
    labels, weight = torch.zeros(size, dtype=torch.int64), torch.zeros(size)
    labels[: len(tokens) - 1], weight[: len(tokens) - 1] = tokens[1:], 1.0
    return PackedBatch(
        tokens[:size], labels, torch.arange(size, dtype=torch.int32), torch.tensor([0, size], dtype=torch.int32), weight, labels * 0, size
    )


def per_document(model: GPT, pieces: list[Piece], corpus: Corpus) -> tuple[float, TENSORS]:
    """Sum over documents, each alone, divided by all labelled tokens."""
    denominator = sum(piece.loss_tokens for piece in pieces)
    loss = sum(model(*alone(piece, corpus).model_inputs)[0] for piece in pieces) / denominator
    loss.backward()
    return float(loss.detach()), {name: parameter.grad for name, parameter in model.named_parameters()}


def per_document_in_transformers(pieces: list[Piece], corpus: Corpus, tied: bool) -> tuple[float, TENSORS]:
    """As ``per_document``, computed by transformers."""
    config = AutoConfig.for_model(**config_to_hf(replace(MODEL, tie_embeddings=tied), dtype="float32"))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.load_state_dict(build(torch.float32, tied).state_dict(), strict=not tied)
    total = torch.zeros(())
    for piece in pieces:
        batch = alone(piece, corpus)
        labelled = batch.loss_weight > 0
        logits = model(input_ids=batch.tokens[None]).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits[labelled], batch.labels[labelled], reduction="sum")
    loss = total / sum(piece.loss_tokens for piece in pieces)
    loss.backward()
    return float(loss.detach()), {name: parameter.grad for name, parameter in model.named_parameters()}


def largest_error(seen: TENSORS, expected: TENSORS) -> float:
    """Largest error of any gradient, relative to the largest value of that gradient."""
    assert seen.keys() == expected.keys()
    return max(float((seen[name] - value).abs().max() / value.abs().max()) for name, value in expected.items())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Documents of 1 to 150 tokens, many of them cut at ``SEQUENCE``."""
    folder = tmp_path_factory.mktemp("engine")
    write_run(folder)
    return corpus_at(write_corpus(folder / "tiny", random_documents(14, 150, seed=5)))


@pytest.mark.parametrize(
    ("ranks", "tokens_per_pack", "tied"), [(1, 48, False), (1, 4096, True), (2, 48, False), (2, 100, True), (3, 64, False)]
)
def test_packed_step_equals_the_sum_over_documents_in_float64(
    run_ranks: RunRanks, corpus: Corpus, ranks: int, tokens_per_pack: int, tied: bool
) -> None:
    loss, gradients = per_document(build(torch.float64, tied), pieces_of(corpus), corpus)
    results = run_ranks(ranks, gradients_by_packs, corpus.path, torch.float64, tokens_per_pack, tied)
    assert [seen for seen, _ in results] == pytest.approx([loss] * ranks, rel=1e-10, abs=0)
    assert largest_error(whole([part for _, part in results]), gradients) < 1e-10


@pytest.mark.parametrize(("ranks", "tokens_per_pack", "tied"), [(1, 100, False), (2, 48, True)])
def test_packed_step_equals_transformers_document_by_document_in_float32(
    run_ranks: RunRanks, corpus: Corpus, ranks: int, tokens_per_pack: int, tied: bool
) -> None:
    loss, gradients = per_document_in_transformers(pieces_of(corpus), corpus, tied)
    results = run_ranks(ranks, gradients_by_packs, corpus.path, torch.float32, tokens_per_pack, tied)
    assert [seen for seen, _ in results] == pytest.approx([loss] * ranks, rel=1e-5, abs=0)
    assert largest_error(whole([part for _, part in results]), gradients) < 1e-5


def mean_of_means(model: GPT, pieces: list[Piece], corpus: Corpus) -> TENSORS:
    labelled = [piece for piece in pieces if piece.loss_tokens]
    torch.stack([model(*alone(piece, corpus).model_inputs)[0] / piece.loss_tokens for piece in labelled]).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def one_dropped(model: GPT, pieces: list[Piece], corpus: Corpus) -> TENSORS:
    return per_document(model, [piece for piece in pieces if piece.document != 3], corpus)[1]


def cut_at_the_border(model: GPT, pieces: list[Piece], corpus: Corpus) -> TENSORS:
    return per_document(model, [replace(piece, has_next=False) for piece in pieces], corpus)[1]


@pytest.mark.parametrize("wrong", [mean_of_means, one_dropped, cut_at_the_border])
def test_the_comparison_notices_a_wrong_step(corpus: Corpus, wrong: Callable[[GPT, list[Piece], Corpus], TENSORS]) -> None:
    _, gradients = per_document(build(torch.float64), pieces_of(corpus), corpus)
    assert largest_error(wrong(build(torch.float64), pieces_of(corpus), corpus), gradients) > 1e-3


def weights_after_steps(world: World, prefix: str, tokens_per_pack: int, clip_norm: float) -> tuple[list[float], TENSORS]:
    corpus = corpus_at(prefix)
    model = build(torch.float64)
    optimizer = build_optimizer(model, OptimizerOptions(lr=0.01, clip_norm=clip_norm), data_grid(world))
    engine = engine_of(world, model, optimizer, corpus)
    norms = []
    for pieces in halves(corpus):
        plan = plan_step([len(p) for p in pieces], world.size, CostModel(tokens_per_pack))
        norms.append(step_by(engine, world, plan, pieces, corpus).grad_norm)
    engine.close()
    return norms, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def halves(corpus: Corpus) -> list[list[Piece]]:
    pieces = pieces_of(corpus)
    middle = len(pieces) // 2
    return [pieces[:middle], pieces[middle:], pieces[:middle]]


@pytest.mark.parametrize(("ranks", "tokens_per_pack"), [(1, 64), (2, 48), (2, 4096)])
def test_clipped_updates_agree_with_torch_on_single_documents(
    run_ranks: RunRanks, corpus: Corpus, ranks: int, tokens_per_pack: int
) -> None:
    """With 4096 tokens a pack the second rank has no pack at all."""
    model = build(torch.float64)
    rule = AdamW(decay_groups(model.named_parameters(), 0.1), lr=0.01)
    norms = []
    for pieces in halves(corpus):
        rule.zero_grad()
        per_document(model, pieces, corpus)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        rule.step()
    assert min(norms) > 0.5, "the clip must bite for this test to see it"
    for seen_norms, weights in run_ranks(ranks, weights_after_steps, corpus.path, tokens_per_pack, 0.5):
        assert seen_norms == pytest.approx(norms, rel=1e-10, abs=0)
        assert largest_error(weights, {name: p.detach() for name, p in model.named_parameters()}) < 1e-9


def flags_and_sources(world: World, prefix: str) -> StepResult:
    corpora = [corpus_at(prefix), corpus_at(prefix)]
    pieces = [replace(piece, source=piece.document % 2) for piece in pieces_of(corpora[0])]
    model = build(torch.float64)
    optimizer = owner_optimizer(model.named_parameters(), RecordingRule, world)
    engine = engine_of(world, model, optimizer, corpora[0], num_sources=2)
    plan = plan_step([len(p) for p in pieces], world.size, CostModel(64))
    packs = [read_pack(pack, pieces, corpora, VOCAB) for pack in plan.packs_of(world.rank)]
    result = engine.step(packs, 1000, torch.tensor([float(world.rank), 1.0], dtype=torch.float64))
    engine.close()
    return result


def test_losses_are_told_apart_by_source_and_flags_summed(run_ranks: RunRanks, corpus: Corpus) -> None:
    model = build(torch.float64)
    sides = [[piece for piece in pieces_of(corpus) if piece.document % 2 == side] for side in (0, 1)]
    counts = [sum(piece.loss_tokens for piece in side) for side in sides]
    sums = [per_document(model, side, corpus)[0] * count for side, count in zip(sides, counts, strict=True)]
    for result in run_ranks(2, flags_and_sources, corpus.path):
        assert result.loss_tokens.tolist() == counts
        assert result.loss_sums.tolist() == pytest.approx(sums, rel=1e-10)
        assert result.loss == pytest.approx(sum(sums) / sum(counts), rel=1e-10)
        assert result.flags.tolist() == [1.0, 2.0]
        assert not result.skipped
