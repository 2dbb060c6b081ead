"""Frequencies of scaled rotary positions against transformers' and against what the methods promise."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_ext.model.rope import rope_tables
from megatron_ext.model.rope_options import KEYS, RopeOptions
from megatron_ext.model.rope_scaling import RopeScaling, resolve_rope, rope_frequencies, yarn_range
from megatron_ext.option_rules import OptionError

ORIGINAL = "original_max_position_embeddings"
YARN = {"rope_type": "yarn", "factor": 8.0, ORIGINAL: 4096}
LLAMA = {"rope_type": "llama3", "factor": 8.0, ORIGINAL: 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = [
    ({"rope_type": "linear", "factor": 4.0}, RopeOptions("linear", 4.0)),
    (YARN, RopeOptions("yarn", 8.0, 4096)),
    (YARN | {"truncate": False}, RopeOptions("yarn", 8.0, 4096, truncate=False)),
    (YARN | {"beta_fast": 12.0, "beta_slow": 3.0}, RopeOptions("yarn", 8.0, 4096, beta_fast=12.0, beta_slow=3.0)),
    (YARN | {"attention_factor": 0.7}, RopeOptions("yarn", 8.0, 4096, attention_factor=0.7)),
    (YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}, RopeOptions("yarn", 8.0, 4096, mscale=0.7, mscale_all_dim=0.4)),
    (YARN | {ORIGINAL: 16}, RopeOptions("yarn", 8.0, 16)),
    (LLAMA, RopeOptions("llama3", 8.0, 8192)),
    (
        LLAMA | {"factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 7.5},
        RopeOptions("llama3", 32.0, 8192, low_freq_factor=2.0, high_freq_factor=7.5),
    ),
]


def llama_config(rope: Mapping[str, Any], theta: float, head_dim: int, max_position: int = 32768) -> LlamaConfig:
    rope = {**rope, "rope_theta": theta}
    return LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, max_position_embeddings=max_position, rope_parameters=rope
    )


@pytest.mark.parametrize("head_dim", [6, 64, 128])
@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize(("theirs", "ours"), CASES)
def test_equals_transformers(theirs: dict[str, Any], ours: RopeOptions, theta: float, head_dim: int) -> None:
    config = llama_config(theirs, theta, head_dim)
    expected, attention_factor = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, "cpu")
    base, scaling = resolve_rope(ours, theta, head_dim, 32768)
    assert base == theta
    assert scaling.attention_factor == pytest.approx(attention_factor, rel=1e-12)
    torch.testing.assert_close(rope_frequencies(head_dim, base, scaling, torch.float32), expected, rtol=1e-6, atol=0)
    positions = torch.tensor([0, 1, 4095, 30000])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    tables = rope_tables(positions, head_dim, base, torch.float32, scaling)
    # An angle of 30,000 radians has a last bit of 0.002.
    torch.testing.assert_close(tables[0], cos[0], rtol=0, atol=5e-3)
    torch.testing.assert_close(tables[1].abs(), sin[0].abs(), rtol=0, atol=5e-3)
    torch.testing.assert_close(tables[0][:2], cos[0, :2], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("head_dim", [6, 64, 128])
def test_ntk_is_the_base_that_transformers_reaches_at_that_length(head_dim: int) -> None:
    config = llama_config({"rope_type": "dynamic", "factor": 1.0}, 1e4, head_dim, max_position=2048)
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=4 * 2048)
    theta, scaling = resolve_rope(RopeOptions("ntk", 4.0), 1e4, head_dim, 8192)
    assert scaling == RopeScaling()
    torch.testing.assert_close(rope_frequencies(head_dim, theta, scaling, torch.float32), expected, rtol=1e-6, atol=0)


def test_ntk_slows_the_last_pair_by_the_factor_and_the_first_not_at_all() -> None:
    theta, scaling = resolve_rope(RopeOptions("ntk", 4.0), 1e4, 64, 8192)
    ratio = rope_frequencies(64, 1e4, scaling, torch.float64) / rope_frequencies(64, theta, scaling, torch.float64)
    assert ratio[0] == 1 and float(ratio[-1]) == pytest.approx(4, rel=1e-12) and bool((ratio.diff() > 0).all())


@pytest.mark.parametrize("options", [ours for _, ours in CASES if ours.kind in ("yarn", "llama3")])
def test_fast_pairs_are_kept_and_slow_ones_divided(options: RopeOptions) -> None:
    _, scaling = resolve_rope(options, 5e5, 128, 32768)
    plain = rope_frequencies(128, 5e5, RopeScaling(), torch.float64)
    ratio = plain / rope_frequencies(128, 5e5, scaling, torch.float64)
    turns = scaling.original_max_position * plain / (2 * math.pi)
    fast, slow = (scaling.beta_fast, scaling.beta_slow) if scaling.kind == "yarn" else (scaling.high_freq_factor, scaling.low_freq_factor)
    # Rounding the pairs outwards leaves the two at the borders in between.
    torch.testing.assert_close(ratio[turns > 1.5 * fast], torch.ones_like(ratio[turns > 1.5 * fast]), rtol=1e-12, atol=0)
    torch.testing.assert_close(ratio[turns < slow / 1.5], torch.full_like(ratio[turns < slow / 1.5], scaling.factor), rtol=1e-12, atol=0)
    assert bool((ratio.diff() >= -1e-9).all()) and float(ratio[-1]) == pytest.approx(scaling.factor)


def test_without_scaling_tables_are_those_of_the_base_to_the_bit() -> None:
    positions = torch.arange(500)
    exponent = torch.arange(0, 64, 2, dtype=torch.float32) / 64
    angle = positions[:, None].float() * (1.0 / 1e4**exponent)
    for scaling in (None, RopeScaling()):
        cos, sin = rope_tables(positions, 64, 1e4, torch.float32, scaling)
        assert torch.equal(cos, torch.cat((angle.cos(),) * 2, 1)) and torch.equal(sin, torch.cat((-angle.sin(), angle.sin()), 1))


def test_factor_and_lengths_decide_each_other() -> None:
    assert resolve_rope(RopeOptions("yarn", original_max_position=4096), 1e4, 64, 32768)[1].factor == 8
    assert resolve_rope(RopeOptions("linear", original_max_position=4096), 1e4, 64, 6144)[1] == RopeScaling("linear", 1.5)
    assert resolve_rope(None, 1e4, 64, 100) == resolve_rope(RopeOptions("default"), 1e4, 64, 100) == (1e4, RopeScaling())
    first, last = yarn_range(64, 1e4, RopeScaling("yarn", 8.0, 4096))
    assert (first, last) == (10, 23), "pairs 10.5 and 22.5, outwards"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (RopeOptions("yarn", 4.0), r"model.rope.original_max_position: null; accepted: a number of tokens"),
        (RopeOptions("llama3"), r"model.rope.original_max_position: null"),
        (RopeOptions("linear"), r"model.rope.original_max_position: null"),
        (
            RopeOptions("ntk", original_max_position=8192),
            r"model.rope.factor: null; accepted: a number, because model.max_position \(8192\) is not above",
        ),
    ],
)
def test_numbers_that_cannot_be_had_are_asked_for(options: RopeOptions, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        resolve_rope(options, 1e4, 64, 8192)


def test_bases_and_heads_that_cannot_be_scaled_are_refused() -> None:
    with pytest.raises(OptionError, match=r"model.rope_theta: 1.0; accepted: more than 1 with model.rope.kind yarn"):
        resolve_rope(RopeOptions("yarn", 4.0, 64), 1.0, 64, 8192)
    with pytest.raises(OptionError, match=r"model.rope.kind: 'ntk'; accepted: others with a head_dim of 2"):
        resolve_rope(RopeOptions("ntk", 4.0), 1e4, 2, 8192)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "linear", "factor": 0.5}, r"factor: 0.5; accepted: at least 1, or null"),
        ({"kind": "linear", "beta_fast": 3.0}, r"beta_fast: 3.0; accepted: null with kind linear"),
        ({"kind": "default", "factor": 2.0}, r"factor: 2.0; accepted: null with kind default"),
        ({"kind": "yarn", "low_freq_factor": 2.0}, r"low_freq_factor: 2.0; accepted: null with kind yarn"),
        ({"kind": "yarn", "beta_slow": 40.0}, r"beta_fast: null; accepted: more than beta_slow \(40\)"),
        ({"kind": "yarn", "mscale": 1.0}, r"mscale: 1.0; accepted: a number together with mscale_all_dim"),
        ({"kind": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.0}, r"attention_factor: 1.0; accepted: null"),
        ({"kind": "yarn", "original_max_position": 0}, r"original_max_position: 0; accepted: more than 0"),
        ({"kind": "llama3", "high_freq_factor": 1.0}, r"high_freq_factor: 1.0; accepted: more than low_freq_factor \(1\)"),
    ],
)
def test_options_that_mean_nothing_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        RopeOptions(**keys)


def test_every_key_is_of_some_kind() -> None:
    assert frozenset().union(*KEYS.values()) | {"kind"} == set(RopeOptions.__dataclass_fields__)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["yarn", "llama3"]),
    st.floats(1, 64),
    st.integers(8, 1 << 20),
    st.floats(2, 1e8),
    st.integers(2, 64).map(lambda n: 2 * n),
)
def test_frequencies_lie_between_plain_and_divided(kind: Any, factor: float, original: int, theta: float, head_dim: int) -> None:
    _, scaling = resolve_rope(RopeOptions(kind, factor, original), theta, head_dim, original)
    plain = rope_frequencies(head_dim, theta, RopeScaling(), torch.float64)
    scaled = rope_frequencies(head_dim, theta, scaling, torch.float64)
    assert bool((scaled <= plain * (1 + 1e-12)).all()) and bool((scaled >= plain / factor * (1 - 1e-12)).all())
