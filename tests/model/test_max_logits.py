"""Largest attention logits of whole models: those of the definition, however layers, heads and tokens are divided."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from megatron_ext.data.batch import PackedBatch, read_pack
from megatron_ext.kernels.max_logits import dense
from megatron_ext.model import attention as attention_module
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.model.max_logits import MaxLogits
from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.pipeline import stages
from megatron_ext.parallel.tensor import TensorParallel
from megatron_ext.parallel.world import World
from megatron_ext.planning import Pack, Plan, Slice
from megatron_ext.train.packs import sharing_of
from tests.distributed import RunRanks
from tests.model.test_gpt import CONFIG, loss_and_gradients, model_of, saved_bytes
from tests.model.test_gpt import Pack as OnePack
from tests.train.test_grids import MODEL, Case
from tests.train.test_plans import LENGTHS, PIECES, Tokens, document

EXACT = 3e-7
"""Values are rounded to float32."""
NOTHING = float("-inf")


class Unnormed(Case):
    """A model whose queries and keys are as they are projected."""

    @property
    def model(self) -> ModelConfig:
        return replace(super().model, qk_norm=False)


def observed(config: ModelConfig = CONFIG, **keys: Any) -> tuple[GPT, MaxLogits]:
    """A model and what it feeds."""
    collector = MaxLogits(config)
    return model_of(config, max_logits=collector, **keys), collector


@torch.no_grad()
def test_equals_the_scores_of_transformers() -> None:
    model, collector = observed()
    shape = {"vocab_size": 37, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 4}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    theirs = LlamaForCausalLM(LlamaConfig(**shape, **heads, attn_implementation="eager")).double()
    theirs.load_state_dict(model.state_dict())
    expected, eager = torch.full((2, 6), NOTHING), modeling_llama.eager_attention_forward

    def spied(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scaling: float, **keys: Any) -> Any:
        scores = q @ modeling_llama.repeat_kv(k, 3).mT * scaling + mask
        expected[module.layer_idx] = torch.maximum(expected[module.layer_idx], scores[0].amax((1, 2)).float())
        return eager(module, q, k, v, mask, scaling, **keys)

    pack = OnePack([5, 1, 17, 2, 9])
    with mock.patch.object(modeling_llama, "eager_attention_forward", spied):
        for one in pack.documents():
            theirs(one.tokens[None])
    pack.loss(model)
    # transformers rounds norms and angles to float32 inside a float64 model.
    torch.testing.assert_close(collector.values, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_changes_no_bit_and_keeps_nothing(recompute: str) -> None:
    pack, plain = OnePack([5, 1, 17, 0, 2, 9]), model_of(recompute=recompute)
    model, collector = observed(recompute=recompute)
    expected, found = loss_and_gradients(plain, [pack]), loss_and_gradients(model, [pack])
    assert torch.equal(expected[0], found[0])
    assert all(torch.equal(grad, found[1][name]) for name, grad in expected[1].items())
    assert saved_bytes(model, pack) == saved_bytes(plain, pack)
    assert collector.values.isfinite().all()
    unrepeated, other = observed()
    pack.loss(unrepeated)
    assert torch.equal(collector.values, other.values), "a second forward pass changes no maximum"


def test_is_computed_only_for_training_and_where_wanted() -> None:
    pack = OnePack([5, 3])
    model, collector = observed()
    with mock.patch.object(attention_module, "max_attention_logits", wraps=attention_module.max_attention_logits) as spy:
        pack.loss(model_of())
        pack.loss(model.eval())
        collector.enabled = False
        pack.loss(model.train())
        assert spy.call_count == 0
        assert (collector.values == NOTHING).all()
        collector.enabled = True
        pack.loss(model)
        assert spy.call_count == CONFIG.num_layers
    assert collector.values.isfinite().all()
    collector.reset()
    assert (collector.values == NOTHING).all()


def test_values_are_kept_by_layer_and_head() -> None:
    collector = MaxLogits(CONFIG)
    collector.add(1, range(2, 4), torch.tensor([3.0, -1.0], dtype=torch.float64))
    collector.add(1, range(3, 5), torch.tensor([-2.0, 7.0]))
    assert collector.values.tolist() == [[NOTHING] * 6, [NOTHING, NOTHING, 3.0, -1.0, 7.0, NOTHING]]


def expected_of(model: GPT) -> torch.Tensor:
    """The definition on every document by itself, in one process."""
    found: list[torch.Tensor] = []
    attend = attention_module.shared_attention

    def spied(q: torch.Tensor, k: torch.Tensor, *others: Any) -> torch.Tensor:
        found.append(dense(q, k, torch.tensor([0, len(q)], dtype=torch.int32)))
        return attend(q, k, *others)

    with mock.patch.object(attention_module, "shared_attention", spied):
        for number in range(len(LENGTHS)):
            model(*document(number, Tokens()).model_inputs)
    return torch.stack(found).unflatten(0, (len(LENGTHS), -1)).amax(0).float()


def whole_model(case: Case, **keys: Any) -> GPT:
    model = GPT(case.model, "dense", **keys)
    model.reset_parameters(seed=3)
    return model.double()


@pytest.mark.parametrize("layers", [(1, 2), (2, 1)])
def test_stages_see_their_layers(layers: tuple[int, ...]) -> None:
    case, x = Case(), None
    collectors = [MaxLogits(case.model) for _ in layers]
    models = [whole_model(case, stage=stage, max_logits=seen) for stage, seen in zip(stages(layers), collectors, strict=True)]
    for number in range(len(LENGTHS)):
        tokens, positions, *documents = document(number, Tokens()).model_inputs[:4]
        x = models[0].embed(tokens)
        for model in models:
            x = model.blocks(x, model.context(positions, *documents))
    assert [(seen.values == NOTHING).all(1).sum() for seen in collectors] == list(layers[::-1])
    merged = torch.maximum(*(seen.values for seen in collectors))
    torch.testing.assert_close(merged, expected_of(whole_model(case)), rtol=EXACT, atol=0)


def batches(plan: Plan, grid: Grid) -> list[PackedBatch]:
    """This rank's packs; their groups are made."""
    for pack in plan.packs:
        grid.block(pack.degree // pack.ring)
        if pack.ring > 1:
            grid.ring(pack.degree, pack.ring)
    rank = grid.dp.rank
    mine = plan.packs_of(rank)
    return [read_pack(pack, PIECES, [Tokens()], MODEL.vocab_size, rank - pack.first_rank) for pack in mine]


def seen_by_rank(world: World, case: Case, plan: Plan, wrong_heads: bool = False) -> tuple[torch.Tensor, bool]:
    """What the layers of this rank report over a plan, forward and backward, and whether a loss has other bits than without reports."""
    grid = Grid(world, GridShape(1, case.ranks // case.tp, case.tp), kv_copies=max(1, case.tp // case.kv_heads))
    collector = MaxLogits(case.model)
    model = GPT(case.model, "sdpa", case.recompute, TensorParallel(grid.tp, case.shard_tokens), max_logits=collector)
    model.reset_parameters(seed=3)
    model.double()
    heads = attention_module.attended_heads
    saboteur = (lambda *arguments: range(len(heads(*arguments)))) if wrong_heads else heads
    losses: list[list[torch.Tensor]] = [[], []]
    with mock.patch.object(attention_module, "attended_heads", saboteur):
        for enabled in (True, False):
            collector.enabled = enabled
            for batch in batches(plan, grid):
                loss, token_loss = model(*batch.model_inputs, sharing_of(batch, grid))
                loss.backward()
                losses[enabled].append(token_loss)
    return collector.values, any(not torch.equal(*pair) for pair in zip(*losses, strict=True))


def plan_of(ranks: int, degree: int, ring: int) -> Plan:
    """All documents in packs of three, in turn by the blocks of ``degree`` ranks."""
    slices = [Slice(number, 0, length) for number, length in enumerate(LENGTHS)]
    cut = [tuple(slices[start : start + 3]) for start in range(0, len(slices), 3)]
    packs = [Pack(number % (ranks // degree) * degree, degree, each, ring) for number, each in enumerate(cut)]
    plan = Plan(ranks, tuple(packs))
    plan.validate(LENGTHS, tokens_per_pack=10**6)
    return plan


PLANS = [
    (Case(ranks=2), 1, 1),
    (Case(ranks=2, recompute="full"), 2, 1),
    (Case(ranks=2), 2, 2),
    (Case(ranks=4), 4, 1),
    (Case(ranks=4, kv_heads=1, recompute="selective"), 4, 1),
    (Case(ranks=4, kv_heads=4), 2, 1),
    (Case(ranks=4, recompute="full"), 4, 2),
    (Case(ranks=4, kv_heads=1), 4, 4),
    (Case(tp=2, ranks=2), 1, 1),
    (Case(tp=2, ranks=4, shard_tokens=True), 2, 1),
    (Case(tp=2, ranks=4, kv_heads=1), 2, 2),
    (Case(tp=4, ranks=4), 1, 1),
]


@pytest.mark.parametrize(("case", "degree", "ring"), PLANS, ids=lambda value: str(value))
def test_the_largest_of_all_ranks_are_those_of_one_process(run_ranks: RunRanks, case: Case, degree: int, ring: int) -> None:
    results = run_ranks(case.ranks, seen_by_rank, case, plan_of(case.ranks // case.tp, degree, ring))
    assert not any(differs for _, differs in results)
    found = torch.stack([values for values, _ in results])
    torch.testing.assert_close(found.amax(0), expected_of(whole_model(case)), rtol=EXACT, atol=0)
    heads = case.model.num_heads * ring // case.tp // degree
    assert ((found > NOTHING).sum(2) == heads).all(), "each rank reports the heads that it attends with, and no others"


def test_the_comparison_notices_wrong_heads(run_ranks: RunRanks) -> None:
    case = Case(ranks=4)
    results = run_ranks(4, seen_by_rank, case, plan_of(4, 4, 1), True)
    found = torch.stack([values for values, _ in results]).amax(0)
    assert not torch.allclose(found, expected_of(whole_model(case)), rtol=1e-2)


def test_without_norms_of_q_and_k_too(run_ranks: RunRanks) -> None:
    """Where QK-clip is used, logits have no bound."""
    case = Unnormed(ranks=2)
    assert not case.model.qk_norm
    found = torch.stack([values for values, _ in run_ranks(2, seen_by_rank, case, plan_of(2, 2, 1))]).amax(0)
    torch.testing.assert_close(found, expected_of(whole_model(case)), rtol=EXACT, atol=0)
