"""Muon against torch.optim.Muon bit for bit, and against the rule written out in float64."""

import copy
import math
from collections.abc import Sequence

import pytest
import torch

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.newton_schulz import polynomial
from megatron_ext.optim import Muon

JORDAN = (3.4445, -4.7750, 2.0315)
LIKE_TORCH = {"ns_coefficients": JORDAN, "ns_steps": 5, "eps": 1e-7, "dtype": torch.bfloat16}
SHAPES = [(24, 48), (24, 48), (48, 24), (24, 48), (32, 32), (1, 20), (33, 70)]
SMALL = [(6, 10), (6, 10), (10, 4), (1, 5)]


def parameters(shapes: Sequence[tuple[int, int]], dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def gradients(shapes: Sequence[tuple[int, int]], step: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Of sizes that differ from step to step."""
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * 10.0 ** (step % 5 - 3) for shape in shapes]


def train(optimizer: torch.optim.Optimizer, steps: range) -> list[torch.Tensor]:
    tensors = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in steps:
        for parameter, gradient in zip(tensors, gradients([p.shape for p in tensors], step, tensors[0].dtype), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [parameter.detach() for parameter in tensors]


def error(mine: torch.Tensor, expected: torch.Tensor) -> float:
    return float((mine.double() - expected.double()).norm() / expected.double().norm())


def equal(mine: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(mine, expected, strict=True))


def run(shapes: Sequence = SMALL, steps: int = 4, of: torch.dtype = torch.float64, **options: object) -> list[torch.Tensor]:
    return train(Muon(parameters(shapes, of), **{"lr": 0.02, **options}), range(steps))


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"adjust_lr_fn": "match_rms_adamw"}, {"adjust_lr_fn": "match_rms_adamw"}),
        ({"adjust_lr_fn": "original"}, {"adjust_lr_fn": "original"}),
        ({"adjust_lr_fn": None, "nesterov": False, "momentum": 0.8}, {"nesterov": False, "momentum": 0.8}),
        ({"adjust_lr_fn": "jordan", "weight_decay": 0.0, "lr": torch.tensor(0.01)}, {"weight_decay": 0.0, "lr": 0.01}),
    ],
    ids=str,
)
def test_is_torchs_bit_for_bit_over_100_steps(options: dict, theirs: dict) -> None:
    mine = Muon(parameters(SHAPES, torch.float32), **LIKE_TORCH, **options)
    torchs = torch.optim.Muon(parameters(SHAPES, torch.float32), **theirs)
    assert equal(train(mine, range(100)), train(torchs, range(100)))
    ours, expected = mine.state_dict(), torchs.state_dict()
    assert ours["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        assert ours["state"][index].keys() == state.keys()
        assert torch.equal(ours["state"][index]["momentum_buffer"], state["momentum_buffer"])


def test_every_setting_matters() -> None:
    options = {**LIKE_TORCH, "lr": 0.02, "adjust_lr_fn": "match_rms_adamw"}
    expected = train(torch.optim.Muon(parameters(SHAPES, torch.float32), lr=0.02, adjust_lr_fn="match_rms_adamw"), range(3))
    assert equal(run(SHAPES, 3, torch.float32, **options), expected)
    changes = {"ns_coefficients": None, "adjust_lr_fn": "spectral", "nesterov": False, "momentum": 0.9, "eps": 1e3}
    for name, value in {**changes, "weight_decay": 0.0, "ns_steps": 6, "method": "gram", "dtype": torch.float32, "normuon": True}.items():
        assert not equal(run(SHAPES, 3, torch.float32, **{**options, name: value}), expected), name


def test_state_goes_from_and_to_torchs() -> None:
    mine, torchs = (
        Muon(parameters(SHAPES, torch.float32), split=1, dtype=torch.bfloat16),
        torch.optim.Muon(parameters(SHAPES, torch.float32), lr=0.02),
    )
    mine_later = Muon(parameters(SHAPES, torch.float32), **LIKE_TORCH)
    torchs_later = torch.optim.Muon(parameters(SHAPES, torch.float32))
    train(torchs, range(5))
    mine.load_state_dict(copy.deepcopy(torchs.state_dict()))
    assert (mine.param_groups[0]["split"], mine.param_groups[0]["ns_coefficients"]) == (1, JORDAN)
    mine_later.load_state_dict(mine.state_dict())
    torchs_later.load_state_dict(copy.deepcopy(mine_later.state_dict()))
    for optimizer in (mine, mine_later, torchs_later):
        for parameter, value in zip(optimizer.param_groups[0]["params"], torchs.param_groups[0]["params"], strict=True):
            parameter.data.copy_(value)
    expected = train(torchs, range(5, 8))
    assert equal(train(mine, range(5, 8)), expected)
    assert equal(train(mine_later, range(5, 8)), expected), "loading copies: the one that was saved has moved on"
    assert equal(train(torchs_later, range(5, 8)), expected)


def written_out(shape: tuple[int, int], index: int, steps: int, coefficients: str, normuon: bool, scale: float) -> torch.Tensor:
    """Muon and NorMuon of parameter ``index`` of SMALL, from the papers, one number at a time where it is not a matrix product."""
    lr, decay, beta, beta2 = 0.02, 0.3, 0.9, 0.8
    weight = parameters(SMALL)[index].detach().clone()
    momentum, second = torch.zeros_like(weight), [0.0] * shape[0]
    for step in range(steps):
        gradient = gradients(SMALL, step)[index]
        momentum = beta * momentum + (1 - beta) * gradient
        update = polynomial(beta * momentum + (1 - beta) * gradient, coefficients=coefficients)
        if normuon:
            norm = math.sqrt(sum(float(x) ** 2 for x in update.flatten()))
            for i, row in enumerate(update):
                second[i] = beta2 * second[i] + (1 - beta2) * sum(float(x) ** 2 for x in row) / shape[1]
            update = torch.stack([row / (math.sqrt(second[i]) + 1e-8) for i, row in enumerate(update)])
            update *= norm / math.sqrt(sum(float(x) ** 2 for x in update.flatten()))
        weight = weight - lr * decay * weight - lr * scale * update
    return weight


@pytest.mark.parametrize("normuon", [False, True], ids=["muon", "normuon"])
@pytest.mark.parametrize("coefficients", ["jordan", "you", "polar_express", "deepseek_v4"])
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_is_the_rule_written_out(coefficients: str, method: str, normuon: bool) -> None:
    options = {"weight_decay": 0.3, "momentum": 0.9, "beta2": 0.8, "coefficients": coefficients, "method": method, "normuon": normuon}
    for name, scale in (
        ("match_rms_adamw", lambda r, c: 0.2 * math.sqrt(max(r, c))),
        ("spectral", lambda r, c: math.sqrt(max(r, c))),
    ):
        mine = run(adjust_lr_fn=name, **options)
        for index, shape in enumerate(SMALL):
            assert error(mine[index], written_out(shape, index, 4, coefficients, normuon, scale(*shape))) < 1e-10
            if shape[0] > shape[1]:  # the rows of others have almost the same norm before
                assert error(mine[index], written_out(shape, index, 4, coefficients, not normuon, scale(*shape))) > 1e-4


def test_normuon_evens_rows_and_keeps_the_norm() -> None:
    options = {"weight_decay": 0.0, "coefficients": "jordan"}
    before = parameters([(6, 30)])[0].detach()
    plain, even = ((run([(6, 30)], 1, normuon=normuon, **options)[0] - before).norm(dim=1) for normuon in (False, True))
    assert float(even.std() / even.mean()) < 1e-6 < 1e-2 < float(plain.std() / plain.mean())
    assert abs(float(even.norm() / plain.norm()) - 1) < 1e-12
    optimizer = Muon(parameters([(6, 30)]), normuon=True)
    train(optimizer, range(1))
    (state,) = optimizer.state.values()
    assert {kind: value.shape for kind, value in state.items()} == {"momentum_buffer": (6, 30), "second_moment": (6,)}


@pytest.mark.parametrize("normuon", [False, True], ids=["muon", "normuon"])
@pytest.mark.parametrize(("split", "rows"), [((4, 2, 2), [4, 2, 2]), (4, [2, 2, 2, 2]), ([1, 7], [1, 7])], ids=str)
def test_blocks_of_a_split_are_matrices_of_their_own(split: object, rows: list[int], normuon: bool) -> None:
    whole, unsplit, cut = (parameters([(8, 5)])[0] for _ in range(3))
    apart = [torch.nn.Parameter(part) for part in cut.detach().split(rows)]
    scale = torch.logspace(0, 2, 8, dtype=torch.float64)[:, None]
    options = {"lr": 0.02, "normuon": normuon}
    optimizers = [Muon([whole], split=split, **options), Muon(apart, **options), Muon([unsplit], **options)]
    for step in range(3):
        gradient = gradients([(8, 5)], step)[0] * scale
        whole.grad, unsplit.grad = gradient, gradient
        for parameter, part in zip(apart, gradient.split(rows), strict=True):
            parameter.grad = part.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert error(whole.detach(), torch.cat(apart).detach()) < 1e-14
    assert error(whole.detach(), unsplit.detach()) > 1e-4, "a split changes the update"
    assert [optimizer.orthogonalizations for optimizer in optimizers] == [len(rows), len(rows), 1]


def test_split_by_name_and_by_group() -> None:
    def named() -> list[tuple[str, torch.nn.Parameter]]:
        return list(zip(("qkv", "out"), parameters([(8, 5), (8, 5)]), strict=True))

    by_name, ((_, qkv), (_, out)) = Muon(named(), lr=0.02, split={"qkv": [4, 2, 2]}), named()
    by_group = Muon([{"params": [qkv], "split": [4, 2, 2]}, {"params": [out]}], lr=0.02)
    assert equal(train(by_name, range(2)), train(by_group, range(2)))
    with pytest.raises(ConfigError, match="split names kqv"):
        Muon(named(), split={"kqv": 2})
    for split, message in ((3, "qkv is 3.*8 rows"), ([4, 2], r"qkv is \[4, 2\].*8 rows"), ([9, -1], "positive")):
        with pytest.raises(ConfigError, match=message):
            Muon(named(), split=split)


def test_gradients_zero_tiny_huge_or_missing() -> None:
    for dtype in (torch.float64, torch.float32):
        first = parameters([(6, 10)] * 4 + [(1, 9)], dtype)
        optimizer = Muon(first, lr=0.1, weight_decay=0.5, dtype=dtype)
        before = [parameter.detach().clone() for parameter in first]
        direction, row = gradients([(6, 10), (1, 9)], 0, dtype)
        given = (torch.zeros(6, 10, dtype=dtype), direction * 1e-13, direction * 1e30, None, row)
        for parameter, gradient in zip(first, given, strict=True):
            parameter.grad = gradient
        optimizer.step()
        assert optimizer.orthogonalizations == 4
        zero, tiny, huge, _, one_row = [(parameter.detach() - old * 0.95) / 0.1 for parameter, old in zip(first, before, strict=True)]
        assert error(zero + before[0], before[0]) < 1e-5, "weight decay alone"
        assert torch.equal(first[3].detach(), before[3]), "no gradient, no step"
        for update, gradient in ((tiny, direction), (huge, direction), (one_row, row)):
            assert error(update, -0.2 * math.sqrt(gradient.shape[1]) * polynomial(gradient)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_resumes_bit_for_bit(dtype: torch.dtype) -> None:
    shapes, options = [(6, 10), (6, 4)], {"normuon": True, "split": [4, 2], "lr": 0.02}
    whole = train(Muon(parameters(shapes, dtype), **options), range(8))
    stopped = Muon(parameters(shapes, dtype), **options)
    weights = train(stopped, range(4))
    resumed = Muon([torch.nn.Parameter(weight.clone()) for weight in weights], lr=1.0)
    resumed.load_state_dict(stopped.state_dict())
    train(stopped, range(4, 6))
    assert equal(train(resumed, range(4, 8)), whole)
    assert {v.dtype for state in resumed.state.values() for v in state.values()} == {torch.promote_types(dtype, torch.float32)}
    forgetful = Muon([torch.nn.Parameter(weight.clone()) for weight in weights], **options)
    assert not equal(train(forgetful, range(4, 8)), whole), "the state matters"


def test_batches_of_equal_shapes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    together = run(SHAPES, 3)
    monkeypatch.setattr("megatron_ext.optim.muon.BATCH_ELEMENTS", 1)
    assert all(error(mine, other) < 1e-12 for mine, other in zip(run(SHAPES, 3), together, strict=True))


def test_closure_is_called_with_gradients() -> None:
    weight = parameters([(3, 4)])[0]
    optimizer = Muon([weight])

    def closure() -> torch.Tensor:
        loss = weight.square().sum()
        (weight.grad,) = torch.autograd.grad(loss, weight)
        return loss

    assert optimizer.step(closure).item() > optimizer.step(closure).item()


def test_errors_say_what_is_accepted() -> None:
    for shape in ((5,), (), (2, 3, 4)):
        with pytest.raises(ConfigError, match="accepts matrices; give it to AdamW"):
            Muon([torch.nn.Parameter(torch.zeros(shape))])
    for name, value, message in (
        ("lr", -1.0, "at least 0"),
        ("momentum", 1.0, "less than 1"),
        ("adjust_lr_fn", "rms", "match_rms_adamw, spectral, jordan"),
        ("coefficients", "quintic", "polar_express"),
        ("ns_steps", 7, "5 polynomials"),
    ):
        with pytest.raises(ConfigError, match=message):
            Muon(parameters(SMALL), **{name: value})
    with pytest.raises(ConfigError, match="blas, triton"):
        run(backend="cutlass")
