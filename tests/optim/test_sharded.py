"""The owner optimizer against torch's AdamW and gradient clipping on whole tensors in one process."""

from collections.abc import Callable

import pytest
import torch

from megatron_ext.errors import CheckpointError
from megatron_ext.optim.adamw import AdamW
from megatron_ext.optim.ownership import OwnedBox
from megatron_ext.parallel.placement import Box
from megatron_ext.parallel.world import World
from tests.distributed import RunRanks
from tests.grids import owner_optimizer

STEPS = 10
OPTIONS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "fused": True}
SHAPES = {"embedding": (37, 8), "weight": (8, 8), "norm": (8,), "head": (8, 5), "scale": ()}
TENSORS = dict[str, torch.Tensor]


def parameters(dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def gradient(name: str, step: int, rank: int, size: int) -> torch.Tensor:
    """This rank's part of a gradient whose sum over any number of ranks is the same up to rounding."""
    generator = torch.Generator().manual_seed(1000 * step + list(SHAPES).index(name))
    total = torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)
    parts = torch.rand(size, generator=generator, dtype=torch.float64)
    return total * parts[rank] / parts.sum()


def give_gradients(named: dict[str, torch.nn.Parameter], step: int, world: World) -> None:
    """Let autograd produce this rank's gradients."""
    for name, parameter in named.items():
        (parameter * gradient(name, step, world.rank, world.size).to(parameter.dtype)).sum().backward()


def adamw(owned: list[tuple[str, torch.Tensor]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([tensor for _, tensor in owned], **OPTIONS)


def by_owners(world: World, dtype: torch.dtype, clip_norm: float) -> tuple[list[float], TENSORS]:
    """Gradient norms, and the parameters that this rank holds after ten steps."""
    named = parameters(dtype)
    optimizer = owner_optimizer(named.items(), adamw, world, clip_norm)
    norms = []
    for step in range(STEPS):
        give_gradients(named, step, world)
        optimizer.step()
        norms.append(optimizer.grad_norm)
    return norms, {name: parameter.detach() for name, parameter in named.items()}


def by_torch(dtype: torch.dtype, clip_norm: float) -> tuple[list[float], TENSORS]:
    """The same ten steps on whole tensors."""
    named = parameters(dtype)
    optimizer = adamw(list(named.items()))
    norms = []
    for step in range(STEPS):
        for name, parameter in named.items():
            parameter.grad = gradient(name, step, 0, 1).to(dtype)
        norms.append(float(torch.nn.utils.clip_grad_norm_(named.values(), clip_norm or float("inf"))))
        optimizer.step()
    return norms, {name: parameter.detach() for name, parameter in named.items()}


def largest_error(seen: TENSORS, expected: TENSORS) -> float:
    return max(float((seen[name] - value).abs().max() / value.abs().max()) for name, value in expected.items())


def test_one_process_is_bit_equal_to_torch() -> None:
    _, seen = by_owners(World(0, 1, torch.device("cpu")), torch.float32, clip_norm=0.0)
    _, expected = by_torch(torch.float32, clip_norm=0.0)
    assert all(torch.equal(seen[name], value) for name, value in expected.items())
    assert not any(torch.equal(value, parameters(torch.float32)[name]) for name, value in expected.items())


def test_clipping_is_that_of_torch() -> None:
    norms, seen = by_owners(World(0, 1, torch.device("cpu")), torch.float32, clip_norm=0.5)
    expected_norms, expected = by_torch(torch.float32, clip_norm=0.5)
    assert norms == pytest.approx(expected_norms, rel=1e-6) and min(norms) > 0.5
    assert largest_error(seen, expected) < 1e-6


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_many_owners_agree_with_torch_and_with_each_other(
    run_ranks: RunRanks, size: int, dtype: torch.dtype, limit: float, clip_norm: float
) -> None:
    norms, expected = by_torch(dtype, clip_norm)
    results = run_ranks(size, by_owners, dtype, clip_norm)
    for seen_norms, seen in results:
        assert seen_norms == results[0][0] == pytest.approx(norms, rel=limit)
        assert all(torch.equal(seen[name], value) for name, value in results[0][1].items()), "replicas differ"
        assert largest_error(seen, expected) < limit


def test_replicas_stay_equal_in_bf16(run_ranks: RunRanks) -> None:
    (norms, first), (_, second) = run_ranks(2, by_owners, torch.bfloat16, 1.0)
    assert all(torch.equal(first[name], value) and value.dtype == torch.bfloat16 for name, value in second.items())
    assert norms == pytest.approx(by_torch(torch.float64, 1.0)[0], rel=0.02)


def tiny_updates(make: Callable[[torch.nn.Parameter], torch.optim.Optimizer]) -> torch.Tensor:
    """A bf16 parameter of ones after 200 steps of 1e-4, each far below the spacing of bf16 at 1 (2^-8)."""
    parameter = torch.nn.Parameter(torch.ones(16, 4, dtype=torch.bfloat16))
    optimizer = make(parameter)
    for _ in range(200):
        parameter.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameter.detach().float()


def test_many_tiny_updates_of_bf16_parameters_are_not_lost() -> None:
    def owners(parameter: torch.nn.Parameter) -> torch.optim.Optimizer:
        def rule(owned: list[tuple[str, torch.Tensor]]) -> torch.optim.Optimizer:
            return AdamW([tensor for _, tensor in owned], lr=1e-4, weight_decay=0.0)

        optimizer = owner_optimizer([("weight", parameter)], rule)
        assert optimizer.owned[0].master.dtype == torch.float32
        return optimizer

    def plain(parameter: torch.nn.Parameter) -> torch.optim.Optimizer:
        return torch.optim.AdamW([parameter], lr=1e-4, weight_decay=0.0)

    assert torch.equal(tiny_updates(owners), torch.full((16, 4), 0.98).bfloat16().float())
    assert torch.equal(tiny_updates(plain), torch.ones(16, 4)), "the control: without master weights nothing moves"


def poisoned(world: World, poison: float) -> tuple[list[bool], int, TENSORS, TENSORS, TENSORS]:
    """Three steps of which the second has a non-finite gradient on the last rank only."""
    named = parameters(torch.float32)
    optimizer = owner_optimizer(named.items(), adamw, world, clip_norm=1.0)
    skipped, after = [], []
    for step in range(3):
        give_gradients(named, step, world)
        if step == 1 and world.rank == world.size - 1:
            named["weight"].grad[3, 4] = poison
        optimizer.step()
        skipped.append(optimizer.overflow)
        after.append({name: parameter.detach().clone() for name, parameter in named.items()})
    return skipped, optimizer.updates, *after


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_not_finite_skips_the_step_on_every_rank(run_ranks: RunRanks, poison: float) -> None:
    for skipped, updates, first, second, third in run_ranks(2, poisoned, poison):
        assert skipped == [False, True, False] and updates == 2
        assert all(torch.equal(second[name], value) for name, value in first.items())
        assert all(value.isfinite().all() and not torch.equal(value, first[name]) for name, value in third.items())


def without_gradients(world: World) -> tuple[float, TENSORS]:
    """Only rank 0 has gradients, as when the other ranks have no pack."""
    named = parameters(torch.float64)
    optimizer = owner_optimizer(named.items(), adamw, world)
    if world.is_main:
        for name, parameter in named.items():
            parameter.grad = gradient(name, 0, 0, 1)
    optimizer.step()
    return optimizer.grad_norm, {name: parameter.detach() for name, parameter in named.items()}


def test_a_rank_without_gradients_takes_part(run_ranks: RunRanks) -> None:
    named = parameters(torch.float64)
    for name, parameter in named.items():
        parameter.grad = gradient(name, 0, 0, 1)
    adamw(list(named.items())).step()
    for norm, seen in run_ranks(3, without_gradients):
        assert norm == pytest.approx(float(torch.stack([p.grad.norm() for p in named.values()]).norm()), rel=1e-12)
        assert largest_error(seen, {name: parameter.detach() for name, parameter in named.items()}) < 1e-12


def one_owned_state(world: World) -> tuple[list[tuple[str, Box]], bool]:
    """Parts that this rank owns; and whether state moved to a fresh optimizer gives the same parameters and the same next step."""
    source, target = parameters(torch.bfloat16), parameters(torch.bfloat16)
    optimizers = [owner_optimizer(named.items(), adamw, world) for named in (source, target)]
    for step in range(3):
        for optimizer, named in zip(optimizers[:1] if step < 2 else optimizers, (source, target), strict=False):
            give_gradients(named, step, world)
            optimizer.step()
        if step == 1:
            saved = {part: {kind: tensor.clone() for kind, tensor in values.items()} for part, values in optimizers[0].owned_state()}
            optimizers[1].load_owned_state(saved.pop)
    parts = [(part.name, part.box) for part, _ in optimizers[0].owned_state()]
    masters = all(torch.equal(a.master, b.master) for a, b in zip(optimizers[0].owned, optimizers[1].owned, strict=True))
    return parts, masters and all(torch.equal(source[name], target[name]) for name in source)


@pytest.mark.parametrize("size", [1, 2])
def test_state_moves_to_another_optimizer_bit_for_bit(run_ranks: RunRanks, size: int) -> None:
    results = run_ranks(size, one_owned_state)
    assert all(equal for _, equal in results)
    assert len({name for parts, _ in results for name, _ in parts}) == len(SHAPES)


def test_state_of_another_shape_is_refused() -> None:
    def read(part: OwnedBox) -> TENSORS:
        return {"master": torch.zeros(99, 8), "exp_avg": torch.zeros(99, 8)}

    optimizer = owner_optimizer(parameters(torch.float32).items(), adamw)
    with pytest.raises(CheckpointError, match=r"embedding \(master\): the part in the checkpoint is \[99, 8\], in the model \[37, 8\]"):
        optimizer.load_owned_state(read)


def test_learning_rate_reaches_the_rule() -> None:
    optimizer = owner_optimizer(parameters(torch.float32).items(), adamw)
    optimizer.set_learning_rate_factor(0.125)
    (group,) = optimizer.rules["adamw"].param_groups
    assert group["lr"] == 0.125 * group["base_lr"] and group["base_lr"] > 0
