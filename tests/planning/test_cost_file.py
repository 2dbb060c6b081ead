import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.planning.cost_file import cost_from_json, cost_to_json, load_cost_model
from megatron_ext.planning.cost_model import AttentionShape, CostModel, Curve

COST = CostModel(
    tokens_per_rank=1000,
    per_token=2e-5,
    per_token_squared=3e-9,
    efficiency_tokens=(128.0, 1024.0),
    efficiency=(0.5, 1.0),
    per_pack=0.01,
    per_step=0.2,
    attention=AttentionShape(4, 8, 2, 64, 2, 2),
    all_to_all=(Curve.line(1e-5, 1e9), Curve((10.0, 100.0, 1000.0), (1.0, 2.0, 30.0))),
    ring_step=Curve.line(2e-5, 5e8),
)


def test_a_cost_model_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(cost_to_json(COST) | {"about": {"device": "any"}}), "utf-8")
    assert load_cost_model(str(path)) == COST


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "c: format is 2; accepted: JSON with format 1"),
        ({"speed": 3}, "c: unknown key 'speed'; accepted: tokens_per_rank, per_token"),
        ({"tokens_per_rank": 0}, "c: tokens_per_rank is 0; accepted: a number of tokens, at least 1"),
        ({"per_token": -1}, "c: per_token is -1; accepted: a number, at least 0"),
        ({"per_token": float("nan")}, "c: per_token is nan"),
        ({"per_pack": True}, "c: per_pack is true"),
        ({"efficiency": [0.5]}, "c: efficiency is"),
        ({"efficiency": [0.0, 1.0]}, "c: efficiency is"),
        ({"efficiency_tokens": [9.0, 3.0]}, "c: efficiency is"),
        ({"attention": {"layers": -1}}, "c: attention.layers is -1; accepted: a whole number, at least 0"),
        ({"attention": {"heads": 1}}, "c: attention: unknown key 'heads'; accepted: layers, query_heads"),
        ({"attention": 3}, "c: attention is 3; accepted: an object"),
        ({"all_to_all": [{"bytes": [1, 2], "seconds": [1]}]}, r"c: all_to_all\[0\] has 2 bytes for 1 seconds"),
        ({"all_to_all": [{"bytes": [2, 1], "seconds": [1, 2]}]}, r"c: all_to_all\[0\] has 2 bytes for 2 seconds; accepted: as many, the"),
        ({"all_to_all": {}}, "c: all_to_all is {}; accepted: a list"),
        ({"ring_step": [1]}, r"c: ring_step is \[1\]; accepted: an object with bytes and seconds"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cost_from_json(cost_to_json(COST) | change, "c")


@pytest.mark.parametrize("text", ["[]", "3", "{", ""])
def test_what_is_no_cost_model_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=r"costs\.json"):
        load_cost_model(str(path))


def test_a_curve_is_interpolated_and_goes_on() -> None:
    curve = Curve((10.0, 100.0, 1000.0), (1.0, 2.0, 30.0))
    assert curve(np.array([0.0, 10.0, 55.0, 100.0, 550.0, 1000.0, 1900.0])).tolist() == pytest.approx(
        [0.0, 1.0, 1.5, 2.0, 16.0, 30.0, 58.0]
    )
    assert Curve()(5.0) == 0.0 and Curve((1.0,), (3.0,))(5.0) == 3.0
    assert Curve.line(0.5, 10.0)(20.0) == 2.5


def test_scaling_scales_what_it_says() -> None:
    scaled = COST.scaled(compute=2.0, exchange=3.0)
    assert scaled.pack_seconds(0.0, 0.0, 1) == 2 * COST.per_pack
    assert scaled.work(np.array([300]))[0] == pytest.approx(2 * COST.work(np.array([300]))[0])
    assert scaled.exchange_seconds(500.0, 4) == pytest.approx(3 * COST.exchange_seconds(500.0, 4))
    assert replace(scaled, per_step=0.0).per_step == 0.0 and scaled.per_step == COST.per_step
