"""The same steps on every grid: losses, gradients and updates by packs, through the real engines, equal those of one process."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch

from megatron_ext.config.deepspeed import deepspeed_config
from megatron_ext.config.load import load_config
from megatron_ext.data.batch import PackedBatch
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.model.placements import placements
from megatron_ext.model.precision import set_recipe
from megatron_ext.optim.adamw import AdamW, decay_groups
from megatron_ext.optim.sharded import ShardedOptimizer
from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.pipeline import stages
from megatron_ext.parallel.placement import Box, slices, whole_box
from megatron_ext.parallel.tensor import TensorParallel
from megatron_ext.parallel.world import World
from megatron_ext.precision.options import PrecisionOptions
from megatron_ext.precision.recipe import Recipe
from megatron_ext.precision.state import PrecisionState
from megatron_ext.train.engine import owner_engine
from megatron_ext.train.losses import LossSums
from tests.distributed import RunRanks
from tests.grids import everywhere
from tests.train.tiny_run import write_run

MODEL = ModelConfig(51, 24, 40, 3, 4, 2, 6, 64, qk_norm=True, qkv_bias=True, init_std=0.2)
"""A vocabulary that nothing divides, and fewer key/value heads than the largest tp."""
STEPS, CLIP = 4, 0.5
RULE = {"lr": 0.01, "eps": 0.01}
"""With the usual small eps, AdamW makes whole steps of the rounding of gradients that are nearly nothing."""
PACKS = ([7, 13, 11], [3], [1, 29], [17, 5], [], [9])
"""Lengths of the documents of each pack; one is empty."""
Parts = list[tuple[str, Box, torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """A grid and what is switched on in it."""

    pp: int = 1
    tp: int = 1
    ranks: int = 1
    layers: tuple[int, ...] = (3,)
    tied: bool = False
    shard_tokens: bool = False
    recompute: str = "none"
    kv_heads: int = 2
    communication: Literal["mxfp8", "mxfp4"] | None = None

    @property
    def model(self) -> ModelConfig:
        return replace(MODEL, tie_embeddings=self.tied, num_kv_heads=self.kv_heads)

    def __str__(self) -> str:
        flags = ["tied"] * self.tied + ["sp"] * self.shard_tokens + [self.recompute] * (self.recompute != "none")
        flags += [self.communication] if self.communication else []
        return "-".join([f"pp{self.pp}dp{self.ranks // self.pp // self.tp}tp{self.tp}", "".join(map(str, self.layers)), *flags])


def set_communication(model: GPT, case: Case) -> None:
    set_recipe(model, Recipe(PrecisionOptions(communication=case.communication)), PrecisionState(seed=0))


def pack_of(lengths: list[int], seed: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    size = sum(lengths)
    tokens, labels = (torch.randint(MODEL.vocab_size, (size,), generator=generator) for _ in range(2))
    weight = torch.ones(size)
    weight[:1] = 0.0
    positions = torch.cat([torch.arange(length) for length in [*lengths, 0]])
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return PackedBatch(tokens, labels, positions, boundaries, weight, torch.zeros(size, dtype=torch.int64), max(lengths, default=0))


def packs() -> list[PackedBatch]:
    return [pack_of(lengths, seed) for seed, lengths in enumerate(PACKS)]


def loss_tokens() -> int:
    return int(sum(pack.loss_weight.sum() for pack in packs()))


class Recording(AdamW):
    """AdamW that keeps the gradients of its first step as the owner sees them, before the update."""

    def __init__(self, owned: list[tuple[str, torch.Tensor]]) -> None:
        super().__init__(decay_groups(owned, 0.1), **RULE)
        self.masters = [master for _, master in owned]
        self.first: list[torch.Tensor] | None = None

    def step(self, closure: None = None) -> None:
        self.first = self.first or [master.grad.clone() for master in self.masters]
        super().step()


def train_on(world: World, config: str, case: Case, dtype: torch.dtype, clip: float) -> dict[str, Any]:
    """Some steps; losses and norms, first gradients that this rank owns, parameters that it holds, and an evaluation."""
    grid = Grid(world, GridShape(case.pp, case.ranks // case.pp // case.tp, case.tp), kv_copies=max(1, case.tp // case.kv_heads))
    model = GPT(case.model, "sdpa", case.recompute, TensorParallel(grid.tp, case.shard_tokens), stages(case.layers)[grid.stage])
    set_communication(model, case)
    model.reset_parameters(seed=3)
    model.to(dtype)
    where = placements(model, grid, case.tied)
    optimizer = ShardedOptimizer(dict(model.named_parameters()), where, everywhere(Recording, where), grid, clip)
    settings = deepspeed_config(load_config(config, [f"parallel.pp={case.pp}"]), grid.shape.dp)
    engine = owner_engine(model, optimizer, grid, settings, 1)
    mine = packs()[grid.dp.rank :: grid.shape.dp]
    results = [engine.step(mine, loss_tokens(), torch.zeros(0, dtype=torch.float64)) for _ in range(STEPS)]
    optimizer.check_replicas()
    (loss,), (tokens,) = engine.evaluate(mine, LossSums(1)).tolist()
    engine.close()
    gradients = [
        (o.part.name, o.part.box, g)
        for o, g in zip(optimizer.owned, optimizer.rules["adamw"].first if optimizer.rules else [], strict=True)
    ]
    parameters = [(name, where[name].box, parameter.detach()) for name, parameter in model.named_parameters()]
    seen = {"losses": [r.loss for r in results], "norms": [r.grad_norm for r in results], "evaluated": loss / tokens}
    return seen | {"gradients": gradients, "parameters": parameters}


def train_alone(case: Case, dtype: torch.dtype, clip: float) -> dict[str, Any]:
    """The same steps in one process by torch alone."""
    model = GPT(case.model, "sdpa")
    set_communication(model, case)
    model.reset_parameters(seed=3)
    model.to(dtype)
    rule = AdamW(decay_groups(model.named_parameters(), 0.1), **RULE)
    losses, norms, gradients = [], [], None
    for _ in range(STEPS):
        rule.zero_grad()
        loss = sum(model(*pack.model_inputs)[0] for pack in packs()) / loss_tokens()
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        gradients = gradients or {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        rule.step()
    evaluated = float(sum(model(*pack.model_inputs)[0] for pack in packs()).detach()) / loss_tokens()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {"losses": losses, "norms": norms, "gradients": gradients, "parameters": parameters, "evaluated": evaluated}


def largest_error(parts: Parts, whole: dict[str, torch.Tensor]) -> float:
    """Largest difference of any part from the whole tensor's values there, relative to the tensor's largest value."""
    errors = []
    for name, box, values in parts:
        expected = whole[name][slices(box, whole_box(whole[name].shape))]
        errors.append(float((values - expected).abs().max() / whole[name].abs().max()))
    return max(errors, default=0.0)


def covered(results: list[dict[str, Any]], kind: str) -> dict[str, int]:
    """Number of values of each parameter that some rank holds, each place once."""
    boxes = {(name, box) for result in results for name, box, _ in result[kind]}
    return {name: sum(_volume(box) for other, box in boxes if other == name) for name, _ in boxes}


def _volume(box: Box) -> int:
    return int(torch.tensor([stop - start for start, stop in box]).prod())


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_run(tmp_path_factory.mktemp("grids")))


def check(run_ranks: RunRanks, config: str, case: Case, dtype: torch.dtype, limit: float) -> None:
    expected = train_alone(case, dtype, CLIP)
    assert min(expected["norms"]) > CLIP, "the clip must bite for this test to see it"
    results = run_ranks(case.ranks, train_on, config, case, dtype, CLIP)
    for result in results:
        assert result["losses"] == pytest.approx(expected["losses"], rel=limit, abs=0)
        assert result["norms"] == pytest.approx(expected["norms"], rel=limit, abs=0)
        assert result["evaluated"] == pytest.approx(expected["evaluated"], rel=limit, abs=0)
        assert largest_error(result["gradients"], expected["gradients"]) < limit
        assert largest_error(result["parameters"], expected["parameters"]) < limit
    for kind in ("gradients", "parameters"):
        assert covered(results, kind) == {name: value.numel() for name, value in expected["parameters"].items()}


CASES = [
    Case(),
    Case(ranks=2, tied=True),
    Case(ranks=3, recompute="full"),
    Case(tp=2, ranks=2, tied=True, shard_tokens=True),
    Case(tp=2, ranks=2, recompute="selective"),
    Case(pp=2, ranks=2, layers=(2, 1), tied=True),
    Case(pp=2, ranks=2, layers=(1, 2), recompute="full"),
    Case(pp=3, ranks=3, layers=(1, 1, 1), tied=True),
    Case(tp=2, ranks=4, shard_tokens=True, recompute="full"),
    Case(tp=4, ranks=4, tied=True),
    Case(tp=4, ranks=4, shard_tokens=True, kv_heads=1),
    Case(pp=2, ranks=4, layers=(1, 2), tied=True, recompute="selective"),
    Case(pp=2, tp=2, ranks=4, layers=(0, 3), shard_tokens=True),
    Case(pp=2, tp=2, ranks=4, layers=(2, 1), tied=True, recompute="full"),
    Case(pp=4, ranks=4, layers=(1, 1, 1, 0)),
    Case(ranks=4),
    Case(tp=2, ranks=2, communication="mxfp8"),
    Case(tp=2, ranks=2, shard_tokens=True, recompute="full", communication="mxfp4"),
    Case(pp=2, tp=2, ranks=4, layers=(2, 1), shard_tokens=True, communication="mxfp8"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_steps_equal_one_process(run_ranks: RunRanks, config: str, case: Case) -> None:
    check(run_ranks, config, case, torch.float64, 1e-10)


@pytest.mark.parametrize(
    "case",
    [
        Case(ranks=2, tied=True),
        Case(tp=2, ranks=2, shard_tokens=True),
        Case(pp=2, ranks=2, layers=(1, 2), tied=True),
        Case(pp=2, tp=2, ranks=4, layers=(2, 1), tied=True, shard_tokens=True),
    ],
    ids=str,
)
def test_float32_steps_equal_one_process(run_ranks: RunRanks, config: str, case: Case) -> None:
    check(run_ranks, config, case, torch.float32, 1e-5)


def test_codes_on_the_wire_are_seen() -> None:
    plain, *coded = (train_alone(Case(communication=each), torch.float64, CLIP)["losses"] for each in (None, "mxfp8", "mxfp4"))
    errors = [abs(losses[-1] / plain[-1] - 1) for losses in coded]
    assert 1e-5 < errors[0] < errors[1] < 0.1


@pytest.mark.slow
def test_all_three_axes_at_once(run_ranks: RunRanks, config: str) -> None:
    check(run_ranks, config, Case(pp=2, tp=2, ranks=8, layers=(1, 2), tied=True, shard_tokens=True), torch.float64, 1e-10)


def train_without(world: World, config: str, case: Case, method: str) -> dict[str, Any]:
    """As ``train_on``, with one method of the optimizer or of the tensor-parallel region switched off."""
    owner: Any = ShardedOptimizer if hasattr(ShardedOptimizer, method) else TensorParallel
    off = {"_sum_replicas": lambda self: None, "leave": lambda self, x: x, "check_replicas": lambda self: None}
    originals = {name: getattr(owner, name) for name in (method, "check_replicas") if hasattr(owner, name)}
    try:
        for name in originals:
            setattr(owner, name, off[name])
        return train_on(world, config, case, torch.float64, CLIP)
    finally:
        for name, original in originals.items():
            setattr(owner, name, original)


@pytest.mark.parametrize(
    ("case", "method"),
    [
        (Case(tp=2, ranks=2, shard_tokens=True), "_sum_replicas"),
        (Case(tp=4, ranks=4), "_sum_replicas"),
        (Case(pp=2, ranks=2, layers=(2, 1), tied=True), "_sum_replicas"),
        (Case(tp=2, ranks=2), "leave"),
    ],
    ids=str,
)
def test_the_comparison_notices_what_is_missing(run_ranks: RunRanks, config: str, case: Case, method: str) -> None:
    expected = train_alone(case, torch.float64, CLIP)
    results = run_ranks(case.ranks, train_without, config, case, method)
    assert max(largest_error(result["gradients"], expected["gradients"]) for result in results) > 1e-3
