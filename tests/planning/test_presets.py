import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.planning.presets import GIB, MIB, Hardware, cost_model, hardware, memory, model

# FlexSP, in ms, MiB, tokens, GiB/s: h, L, MiB a token, alpha1, alpha2, beta1.
PUBLISHED = {
    "7b": (4096, 32, 4.480441895, 5.128e-6, 0.1839576, 629.3563),
    "13b": (5120, 40, 4.220439453, 9.2852e-6, 0.3060189, 1132.5632),
    "30b": (6656, 60, 3.417381836, 15.4262e-6, 0.8035742, 2789.3644),
}
ROUNDED = {
    "7b": (4.4804, 0.18396, 629.36),
    "13b": (4.2204, 0.30602, 1132.56),
    "30b": (3.4174, 0.80357, 2789.36),
}
SPEEDS = {1: float("inf"), 2: 119.5, 4: 104.1, 8: 96.5, 16: 10.33, 32: 5.94, 64: 4.87}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("degree", SPEEDS)
def test_seconds_are_those_of_the_published_formula(name: str, degree: int) -> None:
    hidden, layers, _, alpha1, alpha2, beta1 = PUBLISHED[name]
    cost = cost_model(hardware("a100_40g"), model(name), 64, "zero3")
    lengths = np.array([1, 77, 1024, 6000, 190_000])
    compute = (alpha1 * lengths**2 + alpha2 * lengths).sum() / degree + beta1
    mib = 4 * 2 * layers * hidden * int(lengths.sum()) * 2 / 1024 / 1024 / degree
    milliseconds = compute + mib / SPEEDS[degree]
    found = cost.pack_seconds(cost.work(lengths).sum(), lengths.sum(), degree)
    assert 1e3 * float(found) == pytest.approx(milliseconds, rel=1e-12)


@pytest.mark.parametrize("name", PUBLISHED)
def test_digits_agree_with_the_paper(name: str) -> None:
    _, _, activations, _, alpha2, beta1 = PUBLISHED[name]
    assert (round(activations, 4), round(alpha2, 5), round(beta1, 2)) == ROUNDED[name]
    assert model(name).activation_bytes == activations * MIB


def test_memory_holds_as_many_tokens_as_published() -> None:
    room = memory(hardware("a100_40g"), model("7b"), 64, "zero3")
    assert room.tokens_per_rank == 6407 and room.feasible
    assert room.states == 16 * 7.8498687744140625 * GIB / 64
    assert str(room) == "1.96 GiB of states, 4.480 MiB a token, limit 30.0 GiB: 6407 tokens a rank"
    assert room.peak(6407) <= room.limit < room.peak(6408)
    assert cost_model(hardware("a100_40g"), model("7b"), 64, "zero3").tokens_per_rank == 6407


def test_owned_states_are_weights_and_gradients_on_every_rank() -> None:
    room = memory(hardware("a100_40g"), model("7b"), 64, "owned")
    assert room.states == (6 + 12 / 64) * 7.8498687744140625 * GIB
    assert str(room).endswith("does not fit")
    assert not room.feasible and room.tokens_per_rank == 0
    with pytest.raises(ConfigError, match=r"memory: owned states of 48\.6 GiB on each of 64 ranks .*; accepted: states below 30\.0 GiB"):
        cost_model(hardware("a100_40g"), model("7b"), 64, "owned")
    owned = cost_model(hardware("a100_80g"), model("7b"), 64, "owned")
    assert owned.per_step == pytest.approx(0.6293563) and owned.per_pack == pytest.approx(0.05 * 0.6293563)


def test_what_is_assumed_says_so() -> None:
    assert all("assumed" in hardware(name).description for name in ("a100_80g", "h100"))
    assert "published" in hardware("a100_40g").description and "assumed" in model("7b", kv_heads=8).description
    assert "assumed" not in model("7b").description


def test_fewer_key_value_heads_send_less() -> None:
    whole, grouped = (cost_model(hardware("h100"), model("7b", heads), 64, "zero3") for heads in (64, 8))
    assert float(grouped.exchange_seconds(1e5, 8)) == pytest.approx(2.25 / 4 * float(whole.exchange_seconds(1e5, 8)))
    with pytest.raises(ConfigError, match="kv_heads: 7; accepted: a divisor of the 64 query heads"):
        model("7b", 7)


def test_a_file_may_say_what_a_preset_says(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(asdict(hardware("h100"))))
    assert hardware(str(path)) == hardware("h100")
    path.write_text(json.dumps(asdict(model("13b"))))
    assert model(str(path)) == model("13b")


GOOD = {"description": "mine", "memory": 1e9, "all_to_all": [1e9], "ring": 1e9}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": 0}, "memory: 0; accepted: a positive number"),
        ({"memory": True}, "memory: True; accepted: a positive number"),
        ({"memory": "1e9"}, "memory: '1e9'; accepted: a positive number"),
        ({"memory": float("nan")}, "memory: nan; accepted: a positive number"),
        ({"all_to_all": []}, r"all_to_all: \[\]; accepted: a list of positive numbers"),
        ({"all_to_all": [1, -1]}, "accepted: a list of positive numbers"),
        ({"description": 3}, "description: 3; accepted: a text"),
        ({"memroy": 1e9}, "memroy: unknown key; accepted: .*nearest: memory"),
        ({"ring": None}, "ring: None; accepted: a positive number"),
    ],
)
def test_a_wrong_file_names_key_and_value(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(GOOD))
    assert hardware(str(path)) == Hardware("mine", 1e9, (1e9,), 1e9)
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(ConfigError, match=message):
        hardware(str(path))


def test_a_missing_key_a_broken_file_and_an_unknown_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps({key: value for key, value in GOOD.items() if key != "ring"}))
    with pytest.raises(ConfigError, match="ring: missing; accepted: a positive number"):
        hardware(str(path))
    path.write_text("{")
    with pytest.raises(ConfigError, match="accepted: a JSON file with the fields of Hardware"):
        hardware(str(path))
    path.write_text("[]")
    with pytest.raises(ConfigError, match="description: missing"):
        hardware(str(path))
    with pytest.raises(ConfigError, match="hardware: 'h10'; accepted: a100_40g, a100_80g, h100; nearest: h100, or a JSON file"):
        hardware("h10")
    with pytest.raises(ConfigError, match="model: '8b'; accepted: 7b, 13b, 30b"):
        model("8b")
    with pytest.raises(ConfigError, match="sharding: 'zero9'; accepted: zero3, owned"):
        memory(hardware("h100"), model("7b"), 8, "zero9")  # type: ignore[arg-type]
