"""Every rule on every grid gives what one process gives: Muon to the bit, AdamP within rounding, nothing silently something else."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT, parameter_shapes
from megatron_ext.model.placements import placements
from megatron_ext.optim import AdamP, AdamW, Muon
from megatron_ext.optim.adamw import decay_groups
from megatron_ext.optim.options import AdamPOptions, MuonOptions, OptimizerOptions
from megatron_ext.optim.routing import route
from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.pipeline import stages
from megatron_ext.parallel.placement import Box, slices, whole_box
from megatron_ext.parallel.tensor import TensorParallel
from megatron_ext.parallel.world import World
from megatron_ext.train.build import build_optimizer
from tests.distributed import RunRanks

MODEL = ModelConfig(51, 24, 40, 3, 4, 2, 6, 64, qk_norm=True, qkv_bias=True, init_std=0.2)
"""A vocabulary that nothing divides, and fewer key/value heads than the largest tp."""
STEPS = 4
MUON = OptimizerOptions(rule="muon", lr=0.05, clip_norm=0.0)
ADAMP = OptimizerOptions(rule="adamp", lr=0.05, clip_norm=0.0, weight_decay=0.3)
VARIANTS = {
    "muon": MUON,
    "normuon": replace(MUON, rule="normuon"),
    "heads": replace(MUON, muon=MuonOptions(split_heads=True)),
    "routes": replace(MUON, routes={"model.embed_tokens.weight": "normuon", "*.k_proj.weight": "adamw"}),
}
DELTAS = (0.1, 3.0)
"""Of AdamP: few are projected, and all."""
Values = dict[str, torch.Tensor]
Parts = list[tuple[str, Box, torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """A grid, and what its ranks hold alike."""

    pp: int = 1
    dp: int = 1
    tp: int = 1
    tied: bool = False
    layers: tuple[int, ...] = field(default=(3,))

    @property
    def ranks(self) -> int:
        return self.pp * self.dp * self.tp

    @property
    def model(self) -> ModelConfig:
        return replace(MODEL, tie_embeddings=self.tied)

    def __str__(self) -> str:
        return f"pp{self.pp}dp{self.dp}tp{self.tp}" + "-tied" * self.tied


CASES = [
    Case(dp=2),
    Case(dp=3, tied=True),
    Case(tp=2),
    Case(tp=4),
    Case(pp=2, layers=(2, 1), tied=True),
    Case(dp=2, tp=2),
    Case(pp=2, tp=2, layers=(1, 2), tied=True),
]


def gradient(name: str, shape: torch.Size, step: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Of a whole parameter: correlated over the steps, so that momentum matters."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    constant, other = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return (scale * (constant + (step - 1) * other)).to(dtype)


def each_on_grid(
    world: World, case: Case, variants: list[OptimizerOptions], dtype: torch.dtype, scale: float = 1.0
) -> list[dict[str, Any]]:
    """``on_grid`` of several rules, one after another."""
    return [on_grid(world, case, options, dtype, scale) for options in variants]


def on_grid(world: World, case: Case, options: OptimizerOptions, dtype: torch.dtype, scale: float = 1.0) -> dict[str, Any]:
    """Parameters of this rank after some steps; the gradient of each is on one rank, so that no sum can round."""
    grid = Grid(world, GridShape(case.pp, case.dp, case.tp), kv_copies=max(1, case.tp // case.model.num_kv_heads))
    model = GPT(case.model, tp=TensorParallel(grid.tp), stage=stages(case.layers)[grid.stage])
    model.reset_parameters(seed=3)
    model.to(dtype)
    optimizer = build_optimizer(model, options, grid)
    where = placements(model, grid, case.tied)
    counted = 0
    for step in range(STEPS):
        for name, parameter in model.named_parameters():
            placement = where[name]
            first = grid.dp.rank == 0 and (not placement.partial or placement.replicas[0] == world.rank)
            whole = gradient(name, placement.shape, step, dtype, scale)
            parameter.grad = whole[slices(placement.box, whole_box(placement.shape))].clone() if first else torch.zeros_like(parameter)
        optimizer.step()
        counted += optimizer.orthogonalizations
    optimizer.check_replicas()
    parameters = [(name, where[name].box, parameter.detach()) for name, parameter in model.named_parameters()]
    return {"parameters": parameters, "orthogonalizations": counted, "rules": list(optimizer.rules)}


def alone(case: Case, options: OptimizerOptions, dtype: torch.dtype, scale: float = 1.0) -> Values:
    """The same steps of plain optimizers on whole tensors in one process."""
    model = GPT(case.model)
    model.reset_parameters(seed=3)
    model.to(dtype)
    named = dict(model.named_parameters())
    routes = route(parameter_shapes(case.model), options)
    of_rule = {rule: [(name, named[name]) for name in routes if routes[name] == rule] for rule in set(routes.values())}
    plain: list[torch.optim.Optimizer] = [AdamW(decay_groups(of_rule.get("adamw", []), options.weight_decay), lr=options.lr)]
    for rule in ("muon", "normuon"):
        if rule in of_rule:
            split = {
                name: len(p) // MODEL.head_dim for name, p in of_rule[rule] if ".q_proj" in name or ".k_proj" in name or ".v_proj" in name
            }
            plain.append(Muon(of_rule[rule], lr=options.lr, normuon=rule == "normuon", split=split if options.muon.split_heads else None))
    if "adamp" in of_rule:
        group = [parameter for _, parameter in of_rule["adamp"]]
        plain.append(AdamP(group, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay, delta=options.adamp.delta))
    for step in range(STEPS):
        for name, parameter in named.items():
            parameter.grad = gradient(name, parameter.shape, step, dtype, scale)
        for rule in plain:
            rule.step()
    return {name: parameter.detach() for name, parameter in named.items()}


def compared(results: list[dict[str, Any]], expected: Values) -> dict[str, float]:
    """Largest difference of any rank's part of each parameter, relative to its norm."""
    errors = dict.fromkeys(expected, 0.0)
    for name, box, values in (part for result in results for part in result["parameters"]):
        whole = expected[name]
        difference = (values - whole[slices(box, whole_box(whole.shape))]).norm() / whole.norm()
        errors[name] = max(errors[name], float(difference))
    return errors


def matrices(errors: dict[str, float]) -> dict[str, float]:
    """Of the projections."""
    return {name: error for name, error in errors.items() if "_proj.weight" in name}


def check_equal(results: list[dict[str, Any]], expected: Values, case: Case, options: OptimizerOptions) -> None:
    """To the bit but for what is AdamW's: torch's fused kernel rounds the last values of a tensor, which a part is, in another way."""
    routes = route(parameter_shapes(case.model), options)
    for name, error in compared(results, expected).items():
        assert error <= (1e-7 if routes[name] == "adamw" else 0.0), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_muon_is_that_of_one_process_to_the_bit(run_ranks: RunRanks, case: Case) -> None:
    results = run_ranks(case.ranks, each_on_grid, case, list(VARIANTS.values()), torch.float32)
    usual = alone(case, MUON, torch.float32)
    for number, (name, options) in enumerate(VARIANTS.items()):
        found, expected = [of_rank[number] for of_rank in results], alone(case, options, torch.float32)
        check_equal(found, expected, case, options)
        assert name == "muon" or max(compared(found, usual).values()) > 5e-3, f"{name} must make a difference"
    assert sum(of_rank[0]["orthogonalizations"] for of_rank in results) == STEPS * 7 * MODEL.num_layers, "each matrix once a step"


@pytest.mark.parametrize("scale", [6e4, 1e-7, 0.0])
def test_gradients_of_any_size(run_ranks: RunRanks, scale: float) -> None:
    """Those of float16 at its ends, and none at all; in float64 too."""
    case = Case(tp=2)
    for dtype in (torch.float32, torch.float64):
        results = run_ranks(case.ranks, on_grid, case, MUON, dtype, scale)
        expected = alone(case, MUON, dtype, scale)
        check_equal(results, expected, case, MUON)
        assert all(value.isfinite().all() for value in expected.values())


def test_blockwise_is_another_update(run_ranks: RunRanks) -> None:
    blockwise = replace(MUON, muon=MuonOptions(tp_mode="blockwise"))
    expected = alone(Case(), MUON, torch.float64)
    errors = matrices(compared(run_ranks(2, on_grid, Case(tp=2), blockwise, torch.float64), expected))
    assert min(errors.values()) > 1e-2
    check_equal(run_ranks(2, on_grid, Case(dp=2), blockwise, torch.float64), expected, Case(dp=2), blockwise)


@pytest.mark.parametrize("case", [Case(), *CASES], ids=str)
def test_adamp_is_that_of_one_process(run_ranks: RunRanks, case: Case) -> None:
    variants = [replace(ADAMP, adamp=AdamPOptions(delta=delta)) for delta in DELTAS]
    for dtype, limit in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        results = run_ranks(case.ranks, each_on_grid, case, variants, dtype)
        for number, options in enumerate(variants):
            found = [of_rank[number] for of_rank in results]
            errors = compared(found, alone(case, options, dtype))
            assert max(errors.values()) < limit, errors
        adamw = compared(found, alone(case, replace(options, rule="adamw"), dtype))
        assert max(matrices(adamw).values()) > 1e-2, "the projection must make a difference"
