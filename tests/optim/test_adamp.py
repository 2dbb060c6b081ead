import copy
import inspect
from collections.abc import Callable

import adamp
import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import required

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.adamp import AdamUpdate, adamp_moments, adamp_update
from megatron_ext.kernels.projection import Projection, Summary, as_rows, matrices, project, row_sums, summarize
from megatron_ext.optim import SGDP, AdamP

Gradient = Callable[[Tensor, Tensor], Tensor]


def random(p: Tensor, noise: Tensor) -> Tensor:
    return noise


def across_rows(p: Tensor, noise: Tensor) -> Tensor:
    """Orthogonal to every row of ``p``, as where each channel's scale does not matter; vectors as they are."""
    rows, g = as_rows(p), as_rows(noise)
    return (g - rows * ((g * rows).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True))).view_as(p) if p.ndim > 1 else noise


def across_layer(p: Tensor, noise: Tensor) -> Tensor:
    """Orthogonal to ``p`` as a whole, but to none of its rows."""
    g = noise + p * torch.linspace(-9, 9, len(p), dtype=p.dtype).view(-1, *[1] * (p.ndim - 1))
    return g - p * ((g * p).sum() / p.square().sum())


def decided(p: Tensor, g: Tensor) -> str:
    """What AdamP projects at parameter ``p`` with gradient ``g``."""
    here, sums = matrices((p.shape,), 0.1, p.device), row_sums(p, g, g)
    projection = project(sums, summarize(sums, here, 1e-8), here, 1e-8)
    return "channel" if projection.channel else "layer" if projection.layer else "nothing"


def run(
    rule: Callable[..., torch.optim.Optimizer],
    shape: tuple[int, ...],
    gradient: Gradient = random,
    steps: int = 50,
    dtype: torch.dtype = torch.float32,
    seen: list[str] | None = None,
    **options: object,
) -> Tensor:
    """The parameter after ``steps`` steps from a fixed start; ``seen`` collects what was projected."""
    generator = torch.Generator().manual_seed(3)
    p = torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
    optimizer = rule([p], lr=1e-2, **options)
    for _ in range(steps):
        p.grad = gradient(p.detach(), torch.randn(shape, generator=generator, dtype=dtype))
        if seen is not None:
            seen.append(decided(p.detach(), p.grad))
        optimizer.step()
    return p.detach()


def difference(a: Tensor, b: Tensor) -> float:
    """Relative to ``b``, by norms."""
    return float((a.double() - b.double()).norm() / b.double().norm())


RULES = [(AdamP, adamp.AdamP, {}), (SGDP, adamp.SGDP, {"momentum": 0.9, "dampening": 0.1})]


@pytest.mark.parametrize("options", [{"weight_decay": 0.1, "wd_ratio": 0.5}, {"nesterov": True, "delta": 0.3}])
@pytest.mark.parametrize("gradient", [random, across_rows, across_layer])
@pytest.mark.parametrize(("ours", "published", "extra"), RULES, ids=["AdamP", "SGDP"])
def test_has_the_bits_of_the_published_code(ours: type, published: type, extra: dict, gradient: Gradient, options: dict) -> None:
    seen: list[str] = []
    for shape in [(5, 3), (64, 100), (1, 9), (8, 3, 3, 3), (33, 2), (7,), (1,)]:
        if gradient is across_layer and len(shape) == 1:
            continue
        expected = run(published, shape, gradient, **extra, **options)
        assert torch.equal(run(ours, shape, gradient, seen=seen, **extra, **options), expected), shape
    wanted = {random: {"nothing", "layer"}, across_rows: {"channel", "nothing"}, across_layer: {"layer"}}[gradient]
    assert set(seen) >= wanted, "otherwise the comparison shows less than it says"


@pytest.mark.parametrize(("ours", "published", "extra"), RULES, ids=["AdamP", "SGDP"])
def test_has_the_bits_of_the_published_code_in_float64(ours: type, published: type, extra: dict) -> None:
    options = {"gradient": across_rows, "dtype": torch.float64, "weight_decay": 0.1, **extra}
    assert torch.equal(run(ours, (6, 4, 5), **options), run(published, (6, 4, 5), **options))


@pytest.mark.parametrize(("ours", "published", "_"), RULES, ids=["AdamP", "SGDP"])
def test_takes_the_arguments_of_the_published_code(ours: type, published: type, _: dict) -> None:
    mine, theirs = ([(p.name, p.default) for p in inspect.signature(rule).parameters.values()] for rule in (ours, published))
    assert [name for name, _ in mine[: len(theirs)]] == [name for name, _ in theirs]
    assert all(a == b or b is required for (_, a), (_, b) in zip(mine, theirs, strict=False))


def test_a_flattened_parameter_gets_adamw() -> None:
    """Why nothing here may flatten: the projection would be lost without a word."""
    options = {"weight_decay": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}

    def with_rows(flat_p: Tensor, noise: Tensor) -> Tensor:
        return across_rows(flat_p.view(60, 40), noise.view(60, 40)).view_as(flat_p)

    adamw, flat = (run(rule, (60 * 40,), with_rows, **options) for rule in (torch.optim.AdamW, AdamP))
    whole = run(AdamP, (60, 40), across_rows, **options)
    assert difference(flat, adamw) < 1e-6
    assert difference(whole.flatten(), adamw) > 1e-2


def cut(whole: Tensor, dim: int) -> list[Tensor]:
    """Three uneven shards, as different ranks would hold them."""
    return [part.clone() for part in whole.split([1, whole.shape[dim] - 3, 2], dim)]


def project_shards(sums: list[Tensor], shape: torch.Size, dim: int) -> list[Projection]:
    """What each of the ranks that hold a matrix together decides; the reductions between them, by hand."""
    if dim:
        sums = [torch.stack(sums).sum(0)] * len(sums)
    here = [matrices((shape,), 0.1, s.device, (len(s),)) for s in sums]
    summaries = [summarize(s, h, 1e-8) for s, h in zip(sums, here, strict=True)]
    if not dim:
        cosines, totals = (torch.stack(values) for values in zip(*summaries, strict=True))
        summaries = [Summary(cosines.amax(0), totals.sum(0))] * len(sums)
    return [project(s, summary, h, 1e-8) for s, summary, h in zip(sums, summaries, here, strict=True)]


class ShardedAdamP:
    """AdamP on the shards of one parameter, with everything that ranks would send to each other."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, dim: int, weight_decay: float) -> None:
        (self.parameter,) = parameters
        self.dim, self.lr, self.weight_decay, self.steps = dim, lr, weight_decay, 0
        self.shards = cut(self.parameter.detach(), dim)
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.shards]

    def step(self) -> None:
        self.steps += 1
        adam = AdamUpdate(self.steps)
        tensors = [([p], [g], [m], [v]) for p, g, (m, v) in zip(self.shards, cut(self.parameter.grad, self.dim), self.moments, strict=True)]
        projections = project_shards([adamp_moments(*shard, adam) for shard in tensors], self.parameter.shape, self.dim)
        for shard, projection in zip(tensors, projections, strict=True):
            decays = projection.decays(self.lr, self.weight_decay, 0.1)
            adamp_update(*shard, adam, projection.coefficients, decays, self.lr / adam.corrections[0])
        self.parameter.data = torch.cat(self.shards, self.dim)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("dim", [0, 1], ids=["cut between rows", "cut within rows"])
@pytest.mark.parametrize(("gradient", "fires"), [(across_rows, "channel"), (across_layer, "layer")])
def test_shards_with_reduced_sums_equal_the_whole(gradient: Gradient, fires: str, dim: int, dtype: torch.dtype, tolerance: float) -> None:
    options = {"shape": (24, 18), "dtype": dtype, "weight_decay": 0.1}
    noise = torch.Generator().manual_seed(5)
    # The gradients of the whole run, so that all ways see the same.
    gradients: list[Tensor] = []

    def record(p: Tensor, _: Tensor) -> Tensor:
        gradients.append(gradient(p, torch.randn(p.shape, generator=noise, dtype=dtype)))
        return gradients[-1]

    seen: list[str] = []
    whole = run(AdamP, gradient=record, seen=seen, **options)
    assert seen.count(fires) > 40

    def replay() -> Gradient:
        recorded = iter(gradients)
        return lambda p, _: next(recorded)

    sharded = run(ShardedAdamP, gradient=replay(), dim=dim, **options)
    assert difference(sharded, whole) < tolerance
    assert difference(sharded, run(torch.optim.AdamW, gradient=replay(), **options)) > 1e-2, "AdamW must not pass for AdamP"


@pytest.mark.parametrize("dim", [0, 1], ids=["cut between rows", "cut within rows"])
def test_sgdp_projects_shards_as_the_whole(dim: int) -> None:
    torch.manual_seed(0)
    p, noise, momentum = (torch.randn(9, 8, dtype=torch.float64) for _ in range(3))
    g = across_rows(p, noise)
    here, sums = matrices((p.shape,), 0.1, p.device), row_sums(p, g, momentum)
    whole = momentum - p * project(sums, summarize(sums, here, 1e-8), here, 1e-8).coefficients[:, None]
    shards = list(zip(*(cut(x, dim) for x in (p, g, momentum)), strict=True))
    projections = project_shards([row_sums(*shard) for shard in shards], p.shape, dim)
    parts = [u - p * x.coefficients[:, None] for (p, _, u), x in zip(shards, projections, strict=True)]
    assert difference(torch.cat(parts, dim), whole) < 1e-12
    assert difference(whole, momentum) > 1e-2


@pytest.mark.parametrize("options", [{}, {"fused": True}])
def test_zero_gradients_and_parameters_stay_finite(options: dict) -> None:
    zero, ones = torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.ones(3, 4))
    optimizer = AdamP([zero, ones], lr=0.1, weight_decay=0.5, **options)
    for p in (zero, ones):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(zero, torch.zeros(3, 4))
    torch.testing.assert_close(ones.detach(), torch.full((3, 4), 1 - 0.1 * 0.5 * 0.1))  # a zero gradient is orthogonal: weak decay


def test_parameters_without_gradient_or_values_are_left_alone() -> None:
    idle, empty, turned = (torch.nn.Parameter(x) for x in (torch.ones(2, 2), torch.zeros(0, 3), torch.randn(4, 6).t()))
    before = turned.detach().clone()
    empty.grad, turned.grad = torch.zeros(0, 3), torch.randn(6, 4)
    optimizer = AdamP([idle, empty, turned])
    assert optimizer.step(lambda: 3.5) == 3.5
    assert set(optimizer.state) == {turned}
    straight = torch.nn.Parameter(before.contiguous())
    straight.grad = turned.grad
    AdamP([straight]).step()
    torch.testing.assert_close(turned.detach(), straight.detach(), rtol=1e-6, atol=0)


def steps(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], begin: int, end: int) -> None:
    for number in range(begin, end):
        generator = torch.Generator().manual_seed(number)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


CASES = [
    (AdamP, AdamP, {"lr": 0.01}),
    (AdamP, AdamP, {"lr": 0.01, "fused": True}),
    (SGDP, SGDP, {"lr": 0.01, "momentum": 0.9}),
    (adamp.AdamP, AdamP, {"lr": 0.01, "weight_decay": 0.1}),
    (adamp.SGDP, SGDP, {"lr": 0.01, "momentum": 0.9}),
]


@pytest.mark.parametrize(("first", "second", "options"), CASES, ids=["AdamP", "fused", "SGDP", "from PyPI's AdamP", "from PyPI's SGDP"])
def test_resumes_with_the_same_bits(first: type, second: type, options: dict) -> None:
    torch.manual_seed(0)
    through = [torch.nn.Parameter(torch.randn(shape)) for shape in [(6, 5), (7,), (2, 3, 3)]]
    optimizer = first(through, **options)
    steps(optimizer, through, 0, 6)
    resumed = copy.deepcopy(through)
    other = second(resumed, **options)
    state = copy.deepcopy(optimizer.state_dict())
    for group, mine in zip(state["param_groups"], other.state_dict()["param_groups"], strict=True):
        group.update({key: value for key, value in mine.items() if key not in group})
    other.load_state_dict(state)
    steps(optimizer, through, 6, 12)
    steps(other, resumed, 6, 12)
    assert all(torch.equal(a, b) for a, b in zip(through, resumed, strict=True))


def test_learning_rate_of_a_group_counts() -> None:
    slow, fast = (torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    optimizer = AdamP([{"params": [slow], "lr": 0.0}, {"params": [fast]}], lr=0.5)
    steps(optimizer, [slow, fast], 0, 1)
    assert torch.equal(slow, torch.ones(3, 3))
    assert not torch.equal(fast, torch.ones(3, 3))


@pytest.mark.parametrize(
    "bad", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": 0.0}, {"weight_decay": -0.1}, {"delta": -1.0}, {"wd_ratio": 2.0}]
)
def test_arguments_out_of_range_are_named(bad: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        AdamP([torch.nn.Parameter(torch.ones(1))], **bad)


def test_momentum_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="momentum"):
        SGDP([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=1.0)


def test_fused_refuses_what_it_cannot_take() -> None:
    p = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    p.grad = torch.ones_like(p)
    with pytest.raises(ConfigError, match="float32 tensors on the CPU, not .* torch.float64"):
        AdamP([p], fused=True).step()


@pytest.mark.parametrize("gradient", [random, across_rows, across_layer])
def test_fused_equals_plain(gradient: Gradient) -> None:
    options = {"shape": (24, 18), "gradient": gradient, "weight_decay": 0.1, "steps": 20}
    assert difference(run(AdamP, fused=True, **options), run(AdamP, **options)) < 1e-6
