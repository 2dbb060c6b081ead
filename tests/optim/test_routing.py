"""Which parameter gets which rule, and what is refused."""

from typing import Any

import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import parameter_shapes
from megatron_ext.optim.options import OptimizerOptions
from megatron_ext.optim.routing import route, summarize_routes

MODEL = ModelConfig(50, 24, 40, 12, 4, 2, 6, 64, qk_norm=True, qkv_bias=True)
SHAPES = parameter_shapes(MODEL)


def names_of(wanted: str, **options: Any) -> set[str]:
    return {name for name, found in route(SHAPES, OptimizerOptions(**options)).items() if found == wanted}


@pytest.mark.parametrize("rule", ["muon", "normuon"])
def test_muon_gets_hidden_matrices(rule: str) -> None:
    assert names_of(rule, rule=rule) == {name for name in SHAPES if "_proj.weight" in name}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} < names_of("adamw", rule=rule)


def test_adamp_gets_all_matrices_and_adamw_all() -> None:
    assert names_of("adamp", rule="adamp") == {name for name, shape in SHAPES.items() if len(shape) == 2}
    assert names_of("adamw") == set(SHAPES)


def test_the_last_pattern_that_fits_decides() -> None:
    routes = {"*.mlp.*": "adamp", "model.layers.0.mlp.up_proj.weight": "adamw", "lm_head.weight": "muon"}
    found = route(SHAPES, OptimizerOptions(rule="muon", routes=routes))
    assert found["model.layers.3.mlp.gate_proj.weight"] == "adamp"
    assert found["model.layers.0.mlp.up_proj.weight"] == "adamw"
    assert found["lm_head.weight"] == found["model.layers.0.self_attn.q_proj.weight"] == "muon"
    assert found["model.embed_tokens.weight"] == "adamw"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routes": {"*.qproj.weight": "muon"}}, r"'\*\.qproj\.weight' fits no parameter; nearest: model\..*\.[qo]_proj\.weight"),
        (
            {"routes": {"model.layers.1.*": "muon"}},
            r"gives muon to model\.layers\.1\.self_attn\.q_proj\.bias \[24\]; accepted are matrices",
        ),
        ({"rule": "muon", "routes": {"*_proj.weight": "adamw"}}, "muon is asked for, but no parameter is left for it"),
        ({"routes": {"lm_head.weight": "adamp", "*lm_head*": "adamw"}}, "adamp is asked for, but no parameter"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        route(SHAPES, OptimizerOptions(**options))


@pytest.mark.parametrize("sharding", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("rule", ["muon", "adamp"])
def test_zero_is_refused_with_the_reason(sharding: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=f"sharding: '{sharding}'; accepted: whole_tensor with {rule}: ZeRO hands the rule slices"):
        OptimizerOptions(rule=rule, sharding=sharding)


def test_the_table_says_what_each_rule_got() -> None:
    muon, adamw = summarize_routes(route(SHAPES, OptimizerOptions(rule="muon")), SHAPES)
    hidden = MODEL.num_layers * (2 * 24 * 24 + 2 * 12 * 24 + 3 * 24 * 40)
    assert (muon.rule, muon.tensors, muon.parameters) == ("muon", 7 * MODEL.num_layers, hidden)
    assert muon.parameters + adamw.parameters == MODEL.num_parameters()
    assert muon.examples[0] == "model.layers.*.self_attn.q_proj.weight" and len(muon.examples) == 7
    assert str(muon).startswith(f"84 tensors, {hidden:,} parameters: model.layers.*.self_attn.q_proj.weight, ")
    assert str(muon).endswith("v_proj.weight and 4 more")
