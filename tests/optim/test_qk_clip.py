"""QK-clip: logits of the next forward pass, on any part of a parameter."""

import math
from itertools import pairwise

import pytest
import torch

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.max_logits import dense
from megatron_ext.optim.ownership import OwnedBox, assign_rows
from megatron_ext.optim.qk_clip import QKClip
from megatron_ext.parallel.placement import slices, whole_box

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, LAYERS = 6, 3, 4, 10, 2
NAMES = [f"model.layers.{layer}.self_attn.{p}_proj.{kind}" for layer in range(LAYERS) for p in "qk" for kind in ("weight", "bias")]
LENGTHS = [11, 1, 20]


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in NAMES:
        rows = HEAD_DIM * (HEADS if "q_proj" in name else KV_HEADS)
        shape = (rows, HIDDEN) if name.endswith("weight") else (rows,)
        found[name] = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return found


def max_logits(values: dict[str, torch.Tensor], rotated: bool = False) -> torch.Tensor:
    """Largest logits [layers, heads] of fixed inputs, by the definition."""
    x = torch.randn(sum(LENGTHS), HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    found = []
    for layer in range(LAYERS):
        weights = {p: [values[f"model.layers.{layer}.self_attn.{p}_proj.{kind}"].double() for kind in ("weight", "bias")] for p in "qk"}
        q, k = ((x @ weight.T + bias).unflatten(1, (-1, HEAD_DIM)) for weight, bias in weights.values())
        if rotated:
            q, k = rotate(q), rotate(k)
        found.append(dense(q, k, cu_seqlens))
    return torch.stack(found).float()


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Any rotation of pairs of channels that depends on the token."""
    angles = torch.arange(len(x), dtype=torch.float64)[:, None, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)
    one, other = x.chunk(2, dim=-1)
    return torch.cat((one * angles.cos() - other * angles.sin(), one * angles.sin() + other * angles.cos()), dim=-1)


def clip(tau: float, seen: torch.Tensor, alpha: float = 0.5) -> QKClip:
    rule = QKClip(tau, alpha, HEAD_DIM, HEADS, KV_HEADS)
    rule.observe(seen)
    return rule


def applied(rule: QKClip, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    after = {name: value.clone() for name, value in values.items()}
    for name, value in after.items():
        rule.apply(OwnedBox(name, whole_box(value.shape), 0), value)
    return after


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_afterwards_the_largest_logit_of_a_clipped_group_is_tau(alpha: float, rotated: bool) -> None:
    values = parameters()
    before = max_logits(values, rotated)
    groups = before.unflatten(1, (KV_HEADS, -1)).amax(2)
    tau = float(groups.flatten().sort().values[2:4].mean())
    rule = clip(tau, before, alpha)
    after = max_logits(applied(rule, values), rotated)
    gamma = (tau / groups).clamp(max=1.0).repeat_interleave(HEADS // KV_HEADS, dim=1)
    torch.testing.assert_close(after, before * gamma, rtol=1e-6, atol=0)
    clipped = groups > tau
    assert 0 < clipped.sum() < clipped.numel()
    torch.testing.assert_close(
        after.unflatten(1, (KV_HEADS, -1)).amax(2)[clipped], torch.full((int(clipped.sum()),), tau), rtol=1e-6, atol=0
    )
    assert rule.clipped == (before > tau).sum()


def test_only_rows_of_clipped_groups_change() -> None:
    values = parameters()
    seen = torch.full((LAYERS, HEADS), 1.0)
    seen[1, 3] = 8.0
    rule = clip(2.0, seen)
    assert rule.clipped == 1
    for name, after in applied(rule, values).items():
        changed = (after != values[name]).unflatten(0, (-1, HEAD_DIM)).flatten(1)
        heads = [0, 0, 1, 1, 0, 0] if "q_proj" in name else [0, 1, 0]
        assert changed.all(1).tolist() == changed.any(1).tolist() == [bool(h) and "layers.1" in name for h in heads], name
    torch.testing.assert_close(applied(rule, values)[NAMES[4]][8:16], values[NAMES[4]][8:16] * 0.5)


def test_parts_of_parameters_are_scaled_as_the_whole() -> None:
    """Rows of owners, cut inside heads, and blocks of rows and columns."""
    values = parameters()
    rule = clip(0.5, max_logits(values))
    whole = applied(rule, values)
    boxes = {name: whole_box(value.shape) for name, value in values.items()}
    parts = assign_rows(boxes, 7)
    assert any((bound % HEAD_DIM) for part in parts for bound in part.box[0]), "some borders lie inside heads"
    for name, box in boxes.items():
        rows = [(a, b) for a, b in pairwise(sorted({bound for part in parts if part.name == name for bound in part.box[0]}))]
        for columns in [(0, 3), (3, HIDDEN)] if len(box) == 2 else [()]:
            for first in rows:
                part = OwnedBox(name, (first, columns) if columns else (first,), 0)
                index = slices(part.box, box)
                mine = values[name][index].clone()
                rule.apply(part, mine)
                assert torch.equal(mine, whole[name][index])
    assert all(not torch.equal(whole[name], values[name]) for name in values)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.mlp.q_proj.weight",
        "a.model.layers.0.self_attn.q_proj.weight",
        "model.embed_tokens.weight",
    ],
)
def test_other_parameters_are_left_alone(name: str) -> None:
    value = torch.randn(5, 7)
    before = value.clone()
    clip(0.1, torch.full((1, HEADS), 9.0)).apply(OwnedBox(name, whole_box(value.shape), 0), value)
    assert torch.equal(value, before)


@pytest.mark.parametrize("seen", [-math.inf, -50.0, 2.0, math.nan, math.inf])
def test_what_cannot_be_clipped_changes_no_bit(seen: float) -> None:
    """Unseen heads, negative logits, exactly tau, and what is not finite."""
    values = parameters()
    rule = clip(2.0, torch.full((LAYERS, HEADS), seen))
    assert rule.clipped == 0
    assert all(torch.equal(after, values[name]) for name, after in applied(rule, values).items())


def test_factors_are_those_of_the_last_step() -> None:
    rule = clip(1.0, torch.full((LAYERS, HEADS), 4.0))
    assert rule.clipped == LAYERS * HEADS
    rule.observe(torch.zeros(LAYERS, HEADS))
    values = parameters()
    assert rule.clipped == 0
    assert all(torch.equal(after, values[name]) for name, after in applied(rule, values).items())


@pytest.mark.parametrize(("tau", "alpha", "message"), [(0.0, 0.5, "tau: 0.0"), (math.nan, 0.5, "tau: nan"), (1.0, 1.5, "alpha: 1.5")])
def test_what_cannot_be_is_refused(tau: float, alpha: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QKClip(tau, alpha, HEAD_DIM, HEADS, KV_HEADS)
