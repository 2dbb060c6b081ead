"""Scaled rotary positions in config.json, against transformers itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_ext.checkpoint.hf import save_hf
from megatron_ext.checkpoint.hf_config import config_from_hf, config_to_hf
from megatron_ext.checkpoint.hf_rope import scaling_kind, without_scaling
from megatron_ext.errors import CheckpointError
from megatron_ext.model.norm_options import NormOptions
from megatron_ext.model.rope_scaling import RopeScaling, rope_frequencies
from tests.checkpoint.test_hf import SHAPE, edit_config, load, our_logits, transformers_model

ORIGINAL = "original_max_position_embeddings"
LENGTH = 96
SCALED = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, ORIGINAL: 16},
    "yarn-set": {"rope_type": "yarn", "factor": 8.0, ORIGINAL: 16, "attention_factor": 1.5, "beta_fast": 2.0, "beta_slow": 0.5},
    "yarn-exact": {"rope_type": "yarn", "factor": 8.0, ORIGINAL: 16, "truncate": False},
    "yarn-mscale": {"rope_type": "yarn", "factor": 8.0, ORIGINAL: 16, "mscale": 0.7, "mscale_all_dim": 0.4},
    "llama3": {"rope_type": "llama3", "factor": 8.0, ORIGINAL: 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
PARAMETERS = {**SHAPE, "model_type": "llama", "max_position_embeddings": 128, "head_dim": 32}


@pytest.fixture
def tokens() -> torch.Tensor:
    """Six times as many as the original length of ``SCALED``."""
    return torch.randint(0, SHAPE["vocab_size"], (LENGTH,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("rope", SCALED.values(), ids=SCALED)
def test_logits_equal_transformers_both_ways(family: str, rope: dict[str, Any], tmp_path: Path, tokens: torch.Tensor) -> None:
    keys = {"max_position_embeddings": 128, "head_dim": 32, "initializer_range": 0.06, "rope_parameters": {**rope, "rope_theta": 5e3}}
    theirs = transformers_model(family, keys)
    theirs.save_pretrained(tmp_path / "in")
    ours = load(tmp_path / "in")
    expected = theirs(tokens[None]).logits[0]
    assert (our_logits(ours, tokens) - expected).abs().max() < 2e-5

    save_hf(ours.named_parameters(), ours.config, tmp_path / "out", 2**30, dtype=torch.float32)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (back(tokens[None]).logits[0] - expected).abs().max() < 2e-5

    edit_config(tmp_path / "in", rope_parameters={"rope_type": "default", "rope_theta": 5e3})
    plain = (our_logits(load(tmp_path / "in"), tokens) - expected).abs().max(1).values
    assert plain[:16].max() > 1e-2 and plain[16:].max() > 1e-2, "without scaling they would differ, within and beyond the original length"


def older(rope: dict[str, Any], theta: float) -> dict[str, Any]:
    return {"rope_theta": theta, "rope_scaling": rope}


@pytest.mark.parametrize("rope", SCALED.values(), ids=SCALED)
def test_layouts_of_transformers_4_and_5_mean_the_same(rope: dict[str, Any], tmp_path: Path) -> None:
    newer = config_from_hf({**PARAMETERS, "rope_parameters": {**rope, "rope_theta": 5e5}})
    assert newer.rope.kind == rope["rope_type"] and newer.rope_theta == 5e5
    oldest = {**{key: value for key, value in rope.items() if key != "rope_type"}, "type": rope["rope_type"]}
    assert config_from_hf({**PARAMETERS, **older(rope, 5e5)}) == newer == config_from_hf({**PARAMETERS, **older(oldest, 5e5)})

    exported = json.loads(json.dumps(config_to_hf(newer, dtype="float32")))
    assert config_from_hf(exported) == newer
    for layout in ("rope_parameters", "rope_scaling"):
        assert config_from_hf({key: value for key, value in exported.items() if key != layout}) == newer
    (tmp_path / "config.json").write_text(json.dumps(exported))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == exported["rope_parameters"]


def by_ratio(hf: dict[str, Any], theta: float) -> tuple[torch.Tensor, float]:
    """YaRN as transformers 4.53 reads it: the factor is the longest over the original length, and nothing else."""
    rope = {**hf["rope_scaling"], "rope_theta": theta}
    ratio = hf["max_position_embeddings"] / rope[ORIGINAL]
    config = LlamaConfig(max_position_embeddings=hf["max_position_embeddings"], head_dim=hf["head_dim"], rope_parameters=rope)
    config.rope_parameters = {**config.rope_parameters, "factor": ratio}
    return ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")


@pytest.mark.parametrize(
    "scaling", [{"factor": 4.0}, {"factor": 2.0, "truncate": False}, {"factor": 16.0, "beta_fast": 2.0, "beta_slow": 0.5}]
)
def test_a_factor_that_is_not_the_ratio_of_lengths_is_read_alike_by_all(scaling: dict[str, Any]) -> None:
    """The longest length is 8 times the original one."""
    rope = {"rope_type": "yarn", ORIGINAL: 16, **scaling}
    config = config_from_hf({**PARAMETERS, "rope_parameters": {**rope, "rope_theta": 5e5}})
    theirs, factor = ROPE_INIT_FUNCTIONS["yarn"](LlamaConfig(head_dim=32, rope_parameters={**rope, "rope_theta": 5e5}), "cpu")
    exported = json.loads(json.dumps(config_to_hf(config, dtype="float32")))
    assert exported["max_position_embeddings"] == 128 and exported["rope_parameters"]["factor"] == scaling["factor"]
    back = config_from_hf(exported)
    assert rope_frequencies(32, 5e5, back.rope, torch.float64).tolist() == pytest.approx(
        rope_frequencies(32, 5e5, config.rope, torch.float64).tolist(), rel=1e-14
    )
    for found, attention in (by_ratio(exported, 5e5), ROPE_INIT_FUNCTIONS["yarn"](LlamaConfig(**exported), "cpu")):
        torch.testing.assert_close(found, theirs, rtol=1e-6, atol=0)
        assert attention == pytest.approx(factor, rel=1e-12)
    as_it_was, _ = by_ratio({**exported, "rope_scaling": rope}, 5e5)
    assert (as_it_was - theirs).abs().max() > 1e-4 * theirs.max(), "without the change it would be read as another"


def test_a_factor_that_no_ratio_is_has_no_family() -> None:
    config = config_from_hf({**PARAMETERS, "rope_parameters": {"rope_type": "yarn", ORIGINAL: 16, "factor": 10.0, "rope_theta": 5e5}})
    own = config_to_hf(config, dtype="float32")
    assert own["model_type"] == "megatron_ext" and "rope.factor 10 with model.max_position 128" in own["no_family_has"][0]
    assert config_from_hf(json.loads(json.dumps(own))) == config


def test_a_published_config_is_read(tmp_path: Path) -> None:
    """The keys of Llama 3.1, and of Qwen2.5 with the scaling that its card recommends."""
    llama = {**PARAMETERS, "max_position_embeddings": 131072, **older(SCALED["llama3"] | {ORIGINAL: 8192}, 500000.0)}
    assert config_from_hf(llama).rope == RopeScaling("llama3", 8.0, 8192)
    qwen = {**PARAMETERS, "model_type": "qwen2", "max_position_embeddings": 32768, "use_sliding_window": False}
    qwen = config_from_hf({**qwen, **older({"type": "yarn", "factor": 4.0, ORIGINAL: 32768}, 1e6)})
    assert (qwen.rope.kind, qwen.rope.factor, qwen.rope.original_max_position) == ("yarn", 4.0, 32768)


def test_an_original_length_that_is_left_out_or_stands_outside_is_taken_as_transformers_does(tmp_path: Path) -> None:
    for outside, expected in (({}, 128), ({ORIGINAL: 32}, 32)):
        hf = {**PARAMETERS, **outside, **older({"type": "yarn", "factor": 8.0}, 5e5)}
        (tmp_path / "config.json").write_text(json.dumps(hf))
        theirs, _ = ROPE_INIT_FUNCTIONS["yarn"](AutoConfig.from_pretrained(tmp_path), "cpu")
        ours = config_from_hf(hf)
        torch.testing.assert_close(rope_frequencies(32, 5e5, ours.rope, torch.float32), theirs, rtol=1e-6, atol=0)
        assert ours.rope.original_max_position == expected


def test_own_models_keep_their_scaling(tmp_path: Path) -> None:
    config = config_from_hf({**PARAMETERS, **older(SCALED["yarn-set"], 5e3)})
    own = json.loads(json.dumps(config_to_hf(type(config)(**{**vars(config), "norm": NormOptions("ss")}), dtype="float32")))
    assert own["model_type"] == "megatron_ext" and config_from_hf(own).rope == config.rope
    assert scaling_kind(own) == "yarn" and config_from_hf(without_scaling(own)).rope == RopeScaling()


def test_without_scaling_the_base_stays() -> None:
    for hf in ({**PARAMETERS, **older(SCALED["yarn"], 5e3)}, {**PARAMETERS, "rope_parameters": {**SCALED["llama3"], "rope_theta": 5e3}}):
        plain = config_from_hf(without_scaling(hf))
        assert (plain.rope, plain.rope_theta) == (RopeScaling(), 5e3)
    dynamic = {**PARAMETERS, **older({"rope_type": "dynamic", "factor": 2.0}, 5e3)}
    assert scaling_kind(dynamic) == "dynamic" and config_from_hf(without_scaling(dynamic)).rope == RopeScaling()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (older({"type": "dynamic", "factor": 2.0}, 1e4), r"rope_type 'dynamic'; supported are default, linear, yarn, llama3: its angles"),
        (older({"type": "longrope", "factor": 2.0}, 1e4), r"rope_type 'longrope'; supported are .*change with the longest document"),
        (older({"type": "ntk", "factor": 2.0}, 1e4), r"rope_type 'ntk'; supported are default, linear, yarn, llama3$"),
        (older({"type": "linear", "factor": 0.5}, 1e4), r"rope_scaling: factor: 0.5; accepted: at least 1"),
        (older({"type": "linear", "factor": "2"}, 1e4), r"rope_scaling: factor is '2'; accepted: float"),
        (older({"type": "linear", "factor": True}, 1e4), r"rope_scaling: factor is true; accepted: float"),
        (older({"type": "yarn", "factor": 2.0, "truncate": 1}, 1e4), r"rope_scaling: truncate is 1; accepted: bool"),
        (older({"type": "yarn", "factor": 2.0, "finetuned": True}, 1e4), r"rope_scaling has finetuned, which is not supported"),
        (older({"type": "yarn", ORIGINAL: 128}, 1e4), r"config.json: model.rope.factor: null"),
        ({"rope_scaling": "linear"}, r"rope_scaling is 'linear'; an object is needed"),
        ({"rope_theta": "1e4"}, r"config.json: rope_theta is '1e4'; accepted: float"),
        ({"rope_parameters": SCALED["yarn"], "rope_scaling": SCALED["llama3"]}, r"describe different positions"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config_from_hf({**PARAMETERS, **keys})
