"""Whatever the plan: losses, gradients and parameters of steps are those of one process, and documents do not see each other."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext.config.deepspeed import deepspeed_config
from megatron_ext.config.load import load_config
from megatron_ext.data.batch import PackedBatch, read_pack
from megatron_ext.data.corpus import Piece
from megatron_ext.model.gpt import GPT
from megatron_ext.model.placements import placements
from megatron_ext.optim.sharded import ShardedOptimizer
from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.pipeline import stages
from megatron_ext.parallel.tensor import TensorParallel
from megatron_ext.parallel.world import World
from megatron_ext.planning import CostModel, Pack, Plan, Slice
from megatron_ext.planning.cost_model import AttentionShape
from megatron_ext.train import packs as packs_module
from megatron_ext.train.engine import Engine, owner_engine
from megatron_ext.train.losses import LossSums
from megatron_ext.train.packs import PlannedPacks
from tests.distributed import RunRanks
from tests.grids import everywhere
from tests.train.test_grids import CLIP, MODEL, Case, Recording, covered, largest_error, set_communication
from tests.train.tiny_run import write_run

LENGTHS = (1, 2, 7, 13, 29, 1, 31, 3, 17, 5)
STEPS = 3


@dataclass(frozen=True)
class Tokens:
    """A corpus in memory."""

    seed: int = 0
    changed: int | None = None
    """Document whose first token is another."""
    path = "memory"

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens of a document."""
        tokens = np.random.default_rng((self.seed, document)).integers(0, MODEL.vocab_size, LENGTHS[document] + 1)
        if document == self.changed:
            tokens[0] = (tokens[0] + 1) % MODEL.vocab_size
        return tokens[start:stop]


PIECES = [Piece(0, number, 0, length, has_next=True) for number, length in enumerate(LENGTHS)]


def random_plan(ranks: int, seed: int, heads: int = 4) -> Plan:
    """Any legal plan: random packs of random blocks, with and without rings, some ranks with nothing."""
    draw = random.Random(seed)
    pieces = [Slice(number, 0, length) for number, length in enumerate(LENGTHS)]
    draw.shuffle(pieces)
    packs = []
    while pieces:
        degree = draw.choice([d for d in (1, 2, 4, 8) if d <= ranks])
        block = draw.randrange(ranks // degree)
        count = draw.randint(1, 4)
        taken, pieces = pieces[:count], pieces[count:]
        ring = draw.choice([r for r in (1, 1, 2, 4, 8) if r <= degree <= r * heads])
        packs.append(Pack(block * degree, degree, tuple(taken), ring))
    plan = Plan(ranks, tuple(packs))
    plan.validate(LENGTHS, tokens_per_pack=10**6)
    return plan


def engine_on(world: World, config: str, case: Case, dtype: torch.dtype) -> tuple[Grid, GPT, ShardedOptimizer, Engine]:
    grid = Grid(world, GridShape(case.pp, case.ranks // case.pp // case.tp, case.tp), kv_copies=max(1, case.tp // case.kv_heads))
    model = GPT(case.model, "sdpa", case.recompute, TensorParallel(grid.tp, case.shard_tokens), stages(case.layers)[grid.stage])
    set_communication(model, case)
    model.reset_parameters(seed=3)
    model.to(dtype)
    where = placements(model, grid, case.tied)
    optimizer = ShardedOptimizer(dict(model.named_parameters()), where, everywhere(Recording, where), grid, CLIP)
    settings = deepspeed_config(load_config(config, [f"parallel.pp={case.pp}"]), grid.shape.dp)
    return grid, model, optimizer, owner_engine(model, optimizer, grid, settings, 1)


def packs_of(engine: Engine, plan: Plan, corpus: Tokens) -> PlannedPacks:
    plan = plan.by_rounds(at_least=1) if engine.in_rounds else plan
    return PlannedPacks(engine.packs_of(plan), PIECES, [corpus], MODEL.vocab_size, engine.grid.dp.rank)


def train_by_plans(world: World, config: str, case: Case, dtype: torch.dtype, plans: list[Plan]) -> dict[str, Any]:
    """A step by each plan; losses and norms, first gradients that this rank owns, parameters that it holds."""
    _, model, optimizer, engine = engine_on(world, config, case, dtype)
    flags = torch.zeros(0, dtype=torch.float64)
    results = [engine.step(packs_of(engine, plan, Tokens(seed)), sum(LENGTHS), flags) for seed, plan in enumerate(plans)]
    optimizer.check_replicas()
    (evaluated,), _ = engine.evaluate(packs_of(engine, plans[-1], Tokens()), LossSums(1)).tolist()
    engine.close()
    gradients = [
        (o.part.name, o.part.box, g)
        for o, g in zip(optimizer.owned, optimizer.rules["adamw"].first if optimizer.rules else [], strict=True)
    ]
    where = placements(model, engine.grid, case.tied)
    parameters = [(name, where[name].box, parameter.detach()) for name, parameter in model.named_parameters()]
    seen = {"losses": [r.loss for r in results], "norms": [r.grad_norm for r in results], "evaluated": evaluated}
    return seen | {"gradients": gradients, "parameters": parameters}


def document(number: int, corpus: Tokens) -> PackedBatch:
    return read_pack(Pack(0, 1, (Slice(number, 0, LENGTHS[number]),)), PIECES, [corpus], MODEL.vocab_size)


def train_alone(case: Case, dtype: torch.dtype, steps: int) -> dict[str, Any]:
    """The same steps in one process by torch alone, one document at a time."""
    model = GPT(case.model, "dense")
    set_communication(model, case)
    model.reset_parameters(seed=3)
    model.to(dtype)
    rule = Recording(list(model.named_parameters()))
    losses, norms = [], []
    for seed in range(steps):
        rule.zero_grad()
        loss = sum(model(*document(d, Tokens(seed)).model_inputs)[0] for d in range(len(LENGTHS))) / sum(LENGTHS)
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        if seed == 0:
            gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        rule.step()
    evaluated = float(sum(model(*document(d, Tokens()).model_inputs)[0] for d in range(len(LENGTHS))).detach())
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {"losses": losses, "norms": norms, "gradients": gradients, "parameters": parameters, "evaluated": evaluated}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_run(tmp_path_factory.mktemp("plans")))


def check(run_ranks: RunRanks, config: str, case: Case, dtype: torch.dtype, limit: float, plans: list[Plan]) -> None:
    expected = train_alone(case, dtype, len(plans))
    results = run_ranks(case.ranks, train_by_plans, config, case, dtype, plans)
    for result in results:
        assert result["losses"] == pytest.approx(expected["losses"], rel=limit, abs=0)
        assert result["norms"] == pytest.approx(expected["norms"], rel=limit, abs=0)
        assert result["evaluated"] == pytest.approx(expected["evaluated"], rel=limit, abs=0)
        assert largest_error(result["gradients"], expected["gradients"]) < limit
        assert largest_error(result["parameters"], expected["parameters"]) < limit
    assert covered(results, "gradients") == {name: value.numel() for name, value in expected["gradients"].items()}


CASES = [
    Case(ranks=2),
    Case(ranks=2, tied=True, recompute="full"),
    Case(ranks=4, kv_heads=1),
    Case(ranks=4, recompute="selective"),
    Case(ranks=3, kv_heads=4),
    Case(tp=2, ranks=4, shard_tokens=True, tied=True),
    Case(pp=2, ranks=4, layers=(1, 2), tied=True),
    Case(pp=2, ranks=4, layers=(2, 1), recompute="full"),
    Case(ranks=4, kv_heads=1, communication="mxfp8"),
    Case(tp=2, ranks=4, shard_tokens=True, communication="mxfp4"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_steps_by_random_plans_equal_one_process(run_ranks: RunRanks, config: str, case: Case) -> None:
    data_ranks = case.ranks // case.pp // case.tp
    plans = [random_plan(data_ranks, seed, case.model.num_heads // case.tp) for seed in range(STEPS)]
    assert any(pack.degree > pack.ring for plan in plans for pack in plan.packs)
    assert any(pack.ring > 1 for plan in plans for pack in plan.packs)
    check(run_ranks, config, case, torch.float64, 1e-10, plans)


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case(ranks=8), Case(tp=2, pp=2, ranks=8, layers=(1, 2), shard_tokens=True, tied=True)], ids=str)
def test_random_plans_on_eight_ranks(run_ranks: RunRanks, config: str, case: Case) -> None:
    test_float64_steps_by_random_plans_equal_one_process(run_ranks, config, case)


def test_float32_steps_equal_one_process(run_ranks: RunRanks, config: str) -> None:
    check(run_ranks, config, Case(ranks=4), torch.float32, 2e-5, [random_plan(4, seed) for seed in range(2)])


def losses_by_document(world: World, config: str, plan: Plan, changed: int | None) -> list[tuple[int, int, float]]:
    """(document, position, loss) of this rank's tokens."""
    _, model, _, engine = engine_on(world, config, Case(ranks=world.size), torch.float64)
    seen = []
    for pack, batch in zip(engine.packs_of(plan), packs_of(engine, plan, Tokens(changed=changed)), strict=True):
        losses = model(*batch.model_inputs, packs_module.sharing_of(batch, engine.grid))[1]
        parts = pack.shard(engine.grid.dp.rank - pack.first_rank).slices
        names = [(part.document, position) for part in parts for position in range(part.start, part.stop)]
        seen += [(*name, float(loss)) for name, loss in zip(names, losses.detach(), strict=True)]
    engine.close()
    return seen


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_changed_token_changes_no_other_document(run_ranks: RunRanks, config: str, ranks: int) -> None:
    changed = 4
    for seed in range(3):
        plan = random_plan(ranks, seed)
        before, after = (
            {(d, p): loss for part in run_ranks(ranks, losses_by_document, config, plan, which) for d, p, loss in part}
            for which in (None, changed)
        )
        assert len(before) == sum(LENGTHS)
        assert {d for d, p in before if before[d, p] != after[d, p]} == {changed}


def exchanged(world: World, config: str, case: Case, plan: Plan) -> dict[str, int]:
    """Bytes that this rank sends in exchanges of one step, by collective."""
    grid, _, _, engine = engine_on(world, config, case, torch.float64)
    packs = packs_of(engine, plan, Tokens())
    before = dict(grid.traffic.sent)
    engine.step(packs, sum(LENGTHS), torch.zeros(0, dtype=torch.float64))
    engine.close()
    sent = {kind: count - before.get((axis, kind), 0) for (axis, kind), count in grid.traffic.sent.items() if axis in ("block", "ring")}
    return {"all_to_all": sent.get("all_to_all", 0), "rotate": sent.get("rotate", 0)}


@pytest.mark.parametrize("case", [Case(ranks=4), Case(ranks=4, recompute="full", kv_heads=1)], ids=str)
def test_a_step_sends_what_the_cost_model_says(run_ranks: RunRanks, config: str, case: Case) -> None:
    model, forwards = case.model, 1 + (case.recompute == "full")
    shape = AttentionShape(model.num_layers, model.num_heads, model.num_kv_heads, model.head_dim, 8, forwards)
    cost = CostModel(1000, attention=shape)
    for seed in range(3):
        plan = random_plan(4, seed)
        expected = {"all_to_all": 0.0, "rotate": 0.0}
        for pack in plan.packs:
            ranks = pack.degree * model.num_layers
            there, back = cost.all_to_all_bytes(pack.tokens, pack.degree, pack.ring)
            expected["all_to_all"] += ranks * (forwards + 1) * (there + back)
            there, back = cost.ring_step_bytes(pack.tokens, pack.degree, pack.ring)
            expected["rotate"] += ranks * (pack.ring - 1) * (forwards * there + back)
        seen = run_ranks(4, exchanged, config, case, plan)
        assert {kind: sum(each[kind] for each in seen) for kind in expected} == pytest.approx(expected)


def changing_plans(world: World, config: str) -> tuple[int, int, int]:
    """Groups after a few steps and after 50, each by another plan, and growth of memory between in KiB."""
    case = Case(ranks=world.size)
    grid, _, _, engine = engine_on(world, config, case, torch.float32)
    groups, resident = [], []
    for seed in range(50):
        engine.step(packs_of(engine, random_plan(world.size, seed), Tokens(seed)), sum(LENGTHS), torch.zeros(0, dtype=torch.float64))
        if seed in (9, 49):
            groups.append(len(grid._divisions))
            resident.append(resident_kib())
    engine.close()
    return groups[0], groups[1], resident[1] - resident[0]


def resident_kib() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


def test_a_plan_that_changes_every_step_leaks_nothing(run_ranks: RunRanks, config: str) -> None:
    for early, late, grown in run_ranks(4, changing_plans, config):
        assert early == late <= 5 + 3 + 3, "the grid's lines, blocks of 1, 2 and 4, rings of 2 in 2, 2 in 4 and 4 in 4"
        assert grown < 20_000


def train_without_sums(world: World, config: str, case: Case, plans: list[Plan]) -> dict[str, Any]:
    """As ``train_by_plans``, but of the copies of a key/value head only the last one's gradient counts."""
    from megatron_ext.parallel import sequence

    original = sequence._joined

    def last_copy(pieces: list[torch.Tensor], ranges: tuple[range, ...]) -> torch.Tensor:
        whole = original(pieces, ranges)
        for piece, each in zip(pieces, ranges, strict=True):
            whole[:, each.start : each.stop] = piece
        return whole

    sequence._joined = last_copy
    try:
        return train_by_plans(world, config, case, torch.float64, plans)
    finally:
        sequence._joined = original


def test_the_comparison_notices_lost_gradients_of_copies(run_ranks: RunRanks, config: str) -> None:
    case, plans = Case(ranks=4, kv_heads=1), [random_plan(4, seed) for seed in range(STEPS)]
    expected = train_alone(case, torch.float64, STEPS)
    results = run_ranks(4, train_without_sums, config, case, plans)
    assert max(largest_error(result["gradients"], expected["gradients"]) for result in results) > 1e-3
