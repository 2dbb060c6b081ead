"""Which half is frozen: counts by category, by stage and seed, whatever the ranks; and which rows a gate lets pass."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import parameter_shapes
from megatron_ext.model.norm_options import NormOptions
from megatron_ext.optim.half_fine_tuning import HalfFineTuning
from megatron_ext.optim.magnitude_gate import MagnitudeGate
from megatron_ext.optim.ownership import OwnedBox

LAMA = ModelConfig(50, 24, 40, 6, 4, 2, 6, 64)
SHAPES = parameter_shapes(LAMA)


def frozen(model: ModelConfig = LAMA, seed: int = 0, step: int = 1, stage_steps: int = 10) -> set[str]:
    half = HalfFineTuning(parameter_shapes(model), seed, stage_steps)
    half.prepare(step)
    return {name for name in parameter_shapes(model) if not half.updated(OwnedBox(name, ((0, 1),), 0))}


def test_half_of_every_category_of_every_block() -> None:
    for step in (1, 11, 21):
        names = frozen(step=step)
        attention = Counter(name.split(".")[2] for name in names if "self_attn" in name)
        mlp = Counter(name.split(".")[2] for name in names if "mlp" in name)
        norms = Counter(name.split(".")[2] for name in names if "layernorm" in name)
        assert set(attention.values()) == {2} and len(attention) == 6
        assert sorted(mlp.values()) == [1, 1, 1, 2, 2, 2]
        assert set(norms.values()) == {1} and len(norms) == 6
        assert all(name.startswith("model.layers.") for name in names)
    parameters = sum(math.prod(SHAPES[name]) for name in SHAPES if "layers" in name)
    assert sum(math.prod(SHAPES[name]) for name in frozen()) / parameters == pytest.approx(0.5, abs=0.1)


def test_draws_follow_seed_and_stage() -> None:
    assert frozen(step=1) == frozen(step=10) != frozen(step=11) == frozen(step=20)
    assert frozen(seed=1) != frozen(seed=0) == frozen()
    seen = Counter(name for seed in range(60) for name in frozen(seed=seed))
    assert len(seen) == sum("layers" in name for name in SHAPES) and all(15 < count < 45 for count in seen.values())


def test_a_stage_is_drawn_in_any_order() -> None:
    half = HalfFineTuning(SHAPES, 0, 10)
    for step in (25, 3, 14):
        half.prepare(step)
        assert {name for name in SHAPES if not half.updated(OwnedBox(name, ((0, 1),), 0))} == frozen(step=step)


def test_parts_of_a_module_go_together() -> None:
    names = frozen(replace(LAMA, qkv_bias=True, norm=NormOptions("layer", "peri")))
    for name in names:
        other = name.replace(".bias", ".weight") if name.endswith("bias") else name.replace(".weight", ".bias")
        assert other in names or other not in parameter_shapes(replace(LAMA, qkv_bias=True, norm=NormOptions("layer", "peri")))
    norms = Counter(name.split(".")[2] for name in names if "layernorm" in name and name.endswith("weight"))
    assert set(norms.values()) == {2}, "of four"


def test_a_gate_freezes_the_smallest_share_of_the_rows() -> None:
    values = {"model.layers.0.mlp.up_proj": torch.tensor([3.0, 1.0, 1.0, 1.0, 5.0, 2.0, 9.0])}
    gate = MagnitudeGate(lambda: values, 0.5)
    gate.prepare(1)
    name = "model.layers.0.mlp.up_proj.weight"
    assert gate.updated(OwnedBox(name, ((0, 7), (0, 4)), 0)).tolist() == [True, False, False, False, True, True, True]
    assert gate.updated(OwnedBox(name, ((2, 5), (0, 4)), 0)).tolist() == [False, False, True]
    assert gate.updated(OwnedBox("model.norm.weight", ((0, 4),), 0)) is True
    assert gate.updated(OwnedBox("model.layers.0.mlp.up_proj.bias", ((6, 7),), 0)).tolist() == [True]
    values["model.layers.0.mlp.up_proj"] = torch.ones(7)
    gate.prepare(2)
    assert gate.updated(OwnedBox(name, ((0, 7), (0, 4)), 0)).tolist() == [False] * 3 + [True] * 4, "of equal ones the first"
