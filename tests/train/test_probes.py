"""What is seen inside a model: that of transformers and scipy, the same on every grid, without changing what is trained."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import scipy.stats
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_ext.model.block import Block
from megatron_ext.model.gpt import GPT
from megatron_ext.model.mlp import set_tile
from megatron_ext.model.norm_options import NormOptions
from megatron_ext.model.probes import watched
from megatron_ext.optim.options import OptimizerOptions
from megatron_ext.parallel.group import Group
from megatron_ext.parallel.world import World
from megatron_ext.train.build import build_optimizer
from megatron_ext.train.probes import Probes
from tests.distributed import RunRanks
from tests.grids import data_grid
from tests.model.test_gpt import CONFIG, model_of
from tests.model.test_gpt import Pack as OnePack
from tests.train.outliers import answered_packs, random_weights
from tests.train.outliers import model_of as model_of_weights
from tests.train.tiny_run import losses, records, train, write_run

SITES = ("residual", "input_layernorm", "post_attention_layernorm", "q", "k", "v", "attention_output", "down_proj_input")
Documents = dict[str, list[list[np.ndarray]]]
"""By name, by depth: what each document gave."""


def theirs(pack: OnePack) -> Documents:
    """The same weights in transformers, one document after the other, watched by hooks and by its own outputs."""
    shape = {"vocab_size": 37, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 4}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, attn_implementation="eager")).double()
    model.load_state_dict(model_of().state_dict())
    found: Documents = {name: [[] for _ in range(3)] for name in (*SITES, "gradient", "attention")}
    for layer, block in enumerate(model.model.layers):
        made = {"input_layernorm": block.input_layernorm, "post_attention_layernorm": block.post_attention_layernorm}
        made |= {"q": block.self_attn.q_proj, "k": block.self_attn.k_proj, "v": block.self_attn.v_proj}
        for name, module in made.items():
            module.register_forward_hook(lambda m, a, out, to=found[name][layer]: to.append(out[0].detach().numpy()))
        read = {"attention_output": block.self_attn.o_proj, "down_proj_input": block.mlp.down_proj}
        for name, module in read.items():
            module.register_forward_pre_hook(lambda m, a, to=found[name][layer]: to.append(a[0][0].detach().numpy()))
    streams: list[torch.Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda m, a: streams.append(a[0]))
    for block in model.model.layers:
        block.register_forward_hook(lambda m, a, out: streams.append(out))
    for one in pack.documents():
        if not one.lengths[0]:
            continue
        streams.clear()
        out = model(one.tokens[None], output_attentions=True)
        for stream in streams:
            stream.retain_grad()
        (torch.nn.functional.cross_entropy(out.logits[0], one.labels, reduction="none") * one.weight).sum().backward()
        for depth, stream in enumerate(streams):
            found["residual"][depth].append(stream[0].detach().numpy())
            found["gradient"][depth].append(stream.grad[0].numpy())
        for layer, weights in enumerate(out.attentions):
            found["attention"][layer].append(weights[0].detach().numpy())
    return found


def reading_of(model: GPT, packs: list[OnePack]) -> dict[str, Any]:
    """Forward and backward of some packs, watched as a run watches them."""
    with Probes(model, data_grid()).watch() as reading:
        for pack in packs:
            pack.loss(model)[0].backward()
    return reading.record


@pytest.fixture(scope="module")
def pack() -> OnePack:
    return OnePack([5, 1, 17, 0, 2, 9])


@pytest.fixture(scope="module")
def expected(pack: OnePack) -> Documents:
    return theirs(pack)


@pytest.fixture(scope="module")
def reading(pack: OnePack) -> dict[str, Any]:
    return reading_of(model_of(), [pack])


@pytest.mark.parametrize("site", SITES)
def test_every_site_is_that_of_transformers_and_scipy(expected: Documents, reading: dict[str, Any], site: str) -> None:
    depths = [np.concatenate(documents) for documents in expected[site] if documents]
    assert len(depths) == (3 if site == "residual" else 2) and reading["widths"][site] == depths[0].shape[1]
    by_hand = {
        "kurtosis_centred": [scipy.stats.kurtosis(x, axis=1).mean() for x in depths],
        "kurtosis_released": [np.maximum((x**4).mean(1) / x.std(1, ddof=1) ** 4 - 3, 0).mean() for x in depths],
        "max_to_mean": [(np.abs(x).max(1) / np.abs(x).mean(1)).mean() for x in depths],
        "variance": [x.var(1).mean() for x in depths],
        "top_channel_share": [(x**2).sum(0).max() / (x**2).sum() for x in depths],
    }
    # transformers rounds norms and angles to float32 inside a float64 model.
    assert reading["sites"][site] == {name: pytest.approx(values, rel=1e-4, abs=1e-5) for name, values in by_hand.items()}


def test_gradients_logits_and_sinks_are_those_of_transformers(expected: Documents, reading: dict[str, Any], pack: OnePack) -> None:
    gradients = [math.sqrt(sum(float((g**2).sum()) for g in depth)) for depth in expected["gradient"]]
    assert reading["gradient_norm"] == pytest.approx(gradients, rel=2e-5)
    masses = [np.concatenate([weights[:, 1:, 0].mean(0) for weights in layer]).mean() for layer in expected["attention"][:2]]
    assert reading["sink_mass"] == pytest.approx(masses, rel=2e-5)
    uniform = [1 / (position + 1) for length in pack.lengths for position in range(1, length)]
    assert reading["sink_mass_uniform"] == pytest.approx(sum(uniform) / len(uniform), rel=1e-12)
    assert len(reading["max_logit"]) == 2 and all(0 < value < 100 for value in reading["max_logit"])


def test_gradients_of_parameters_are_those_of_autograd(reading: dict[str, Any], pack: OnePack) -> None:
    plain, trained, grid = model_of(), model_of(), data_grid()
    pack.loss(plain)[0].backward()
    optimizer = build_optimizer(trained, OptimizerOptions(clip_norm=1e-3), grid)
    with Probes(trained, grid, optimizer=optimizer).watch() as seen:
        optimizer.expect_backwards(1)
        pack.loss(trained)[0].backward()
        optimizer.step()
    norms = [math.sqrt(sum(float(p.grad.square().sum()) for p in block.parameters())) for block in plain.model.layers.values()]
    assert seen.record["parameter_gradient_norm"] == pytest.approx(norms, rel=1e-12), "before clipping"
    assert reading["parameter_gradient_norm"] == [None, None], "nobody took a step"
    squares = optimizer.gradient_squares()
    assert squares.keys() == dict(plain.named_parameters()).keys()
    assert sum(squares.values()) == pytest.approx(optimizer.grad_norm**2, rel=1e-12)


def test_packs_add_up(reading: dict[str, Any], pack: OnePack) -> None:
    apart = reading_of(model_of(), [*pack.documents()[::2], OnePack([]), *pack.documents()[1::2]])
    assert_close(apart, reading, 1e-11)


def assert_close(found: Any, wanted: Any, limit: float) -> None:
    """All numbers of two records, without their times."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted.keys() - {"time"}:
            assert_close(found[key], wanted[key], limit)
    elif wanted != found:
        assert found == pytest.approx(wanted, rel=limit, abs=limit)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_what_backward_computes_again_is_not_seen(reading: dict[str, Any], pack: OnePack, recompute: str) -> None:
    with mock.patch.object(Block, "_forward", autospec=True, side_effect=Block._forward) as calls:
        assert reading_of(model_of(recompute=recompute), [pack]) == reading
    assert calls.call_count == 2 * CONFIG.num_layers, "blocks did run again"


def test_tiles_of_tokens_are_seen_as_one(reading: dict[str, Any], pack: OnePack) -> None:
    model = model_of()
    set_tile(model, 4)
    assert_close(reading_of(model, [pack]), reading, 1e-11)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_no_gradient_changes_a_bit(pack: OnePack, recompute: str) -> None:
    plain, seen = model_of(recompute=recompute), model_of(recompute=recompute)
    pack.loss(plain)[0].backward()
    reading_of(seen, [pack])
    gradients = dict(seen.named_parameters())
    assert all(torch.equal(parameter.grad, gradients[name].grad) for name, parameter in plain.named_parameters())


def hooks(model: GPT) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_are_there_while_somebody_watches_and_no_longer(pack: OnePack) -> None:
    model = model_of()
    with pytest.raises(KeyboardInterrupt), watched(model, ["input_layernorm"]):
        assert hooks(model) > 10 and model.model.layers["0"].self_attn.max_logits is not None
        raise KeyboardInterrupt
    assert hooks(model) == 0 and model.model.layers["0"].self_attn.max_logits is None


@pytest.mark.parametrize("placement", ["post", "peri", "mix"])
def test_norms_are_found_wherever_they_are(pack: OnePack, placement: str) -> None:
    config = replace(CONFIG, norm=NormOptions("ss", placement), qk_norm=True)
    model = model_of(config)
    record = reading_of(model, [pack])
    names = {name.split(".")[3] for name, _ in model.named_parameters() if name.endswith("norm.weight") and name.count(".") == 4}
    assert len(names) >= 2 and record["sites"].keys() == {*SITES, *names} - ({*SITES[1:3]} - names)
    for name in names:
        has = [hasattr(block, name) for block in model.model.layers.values()]
        assert [value is not None for value in record["sites"][name]["variance"]] == has
    unit = [v for name in names for v in record["sites"][name]["max_to_mean"] if v is not None]
    assert len(unit) >= 4 and all(1 < value < CONFIG.hidden_size for value in unit)


@pytest.mark.parametrize(("residual", "down", "marked"), [(0.0, 1.0, set()), (60.0, 1.0, {"residual"}), (0.0, 50.0, {"down_proj_input"})])
def test_planted_outliers_are_seen_where_they_are(residual: float, down: float, marked: set[str]) -> None:
    model = model_of_weights(random_weights(residual, down)).train()
    with Probes(model, data_grid()).watch() as reading:
        for batch in answered_packs(model):
            model(*batch.model_inputs)[0].backward()
    sites = reading.record["sites"]
    full = {site for site in sites if min(sites[site]["top_channel_share"]) > 0.5}
    assert full - {"input_layernorm", "post_attention_layernorm"} == marked
    sharp = {site for site in ("residual", "down_proj_input") if min(sites[site]["kurtosis_released"]) > reading.record["widths"][site] / 3}
    assert sharp == marked, "a single channel has the kurtosis of the width"


PROBED = {
    **{"train__dtype": "float64", "train__steps": 3, "logging__probes_every": 2},
    **{"planning__tokens_per_pack": 128, "evaluation__tokens": 32, "checkpoint__every": None},
}
"""Few packs, because ranks of a loaded machine wait long for each other."""


def probed_run(run_ranks: RunRanks, folder: Path, ranks: int, **changes: Any) -> list[dict[str, Any]]:
    run_ranks(ranks, train, write_run(folder, **{**PROBED, **changes}))
    return records(folder / "run", "probe")


@pytest.fixture(scope="module")
def alone(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("alone")
    probed_run(run_ranks, folder, 1)
    yield folder / "run"


def test_steps_are_looked_into_as_often_as_asked_and_losses_stay(run_ranks: RunRanks, tmp_path: Path, alone: Path) -> None:
    assert [record["step"] for record in records(alone, "probe")] == [1, 2]
    assert probed_run(run_ranks, tmp_path, 1, logging__probes_every=None) == []
    assert losses(tmp_path / "run") == losses(alone)


SHARED = {"planning__policy": "static", "planning__degree": 2, "planning__tokens_per_pack": 16}
GRIDS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"parallel__tp": 2, "train__activation_checkpointing": "full"}),
    "tp4-copied-heads": (4, {"parallel__tp": 4}),
    "tp2-tokens": (2, {"parallel__tp": 2, "parallel__sequence_parallel_activations": True}),
    "pp2": (2, {"parallel__pp": 2, "train__activation_checkpointing": "selective"}),
    "dp2": (2, {}),
    "shared": (2, SHARED),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_sees_the_same(run_ranks: RunRanks, tmp_path: Path, alone: Path, grid: str) -> None:
    ranks, changes = GRIDS[grid]
    found = probed_run(run_ranks, tmp_path, ranks, **changes)
    assert len(found) == 2
    for record, wanted in zip(found, records(alone, "probe"), strict=True):
        assert_close(record, wanted, 1e-10)


def test_rings_see_the_same(run_ranks: RunRanks, tmp_path: Path) -> None:
    one_head = {"model__num_heads": 1, "model__num_kv_heads": 1}
    wanted = probed_run(run_ranks, tmp_path / "alone", 1, **one_head)
    found = probed_run(
        run_ranks, tmp_path / "ring", 2, **one_head, planning__policy="adaptive", planning__largest_degree=2, planning__tokens_per_pack=16
    )
    assert any(pack[2] == 2 for plan in records(tmp_path / "ring/run", "plan") for pack in plan["packs"])
    for pair in zip(found, wanted, strict=True):
        assert_close(*pair, 1e-10)


def test_zero_sees_the_same_in_float32(run_ranks: RunRanks, tmp_path: Path, alone: Path) -> None:
    found = probed_run(run_ranks, tmp_path, 2, optimizer__sharding="zero3", train__dtype="float32", train__steps=2)
    wanted = records(alone, "probe")[0]
    norms = wanted.pop("parameter_gradient_norm")
    assert found[0].pop("parameter_gradient_norm") == [None] * len(norms), "DeepSpeed does not say"
    assert_close(found[0], wanted, 1e-4)


def test_clipping_by_logits_goes_on(run_ranks: RunRanks, tmp_path: Path) -> None:
    clip = {"optimizer__qk_clip": 0.2, "optimizer__rule": "muon", "train__steps": 2}
    seen = probed_run(run_ranks, tmp_path / "seen", 1, **clip)
    probed_run(run_ranks, tmp_path / "plain", 1, **clip, logging__probes_every=None)
    steps = [records(tmp_path / name / "run", "train") for name in ("seen", "plain")]
    for key in ("loss", "max_logit", "clipped_heads"):
        first, second = ([step[key] for step in run] for run in steps)
        assert first == second, key
    assert max(seen[1]["max_logit"]) == pytest.approx(steps[0][1]["max_logit"], rel=1e-6)


def train_without_sums(world: World, config: Path) -> None:
    """As ``train``, each tensor-parallel rank taking its channels for all."""
    original = Group.all_reduce

    def all_reduce(self: Group, tensor: torch.Tensor, *arguments: Any) -> torch.Tensor:
        return tensor if tensor.ndim == 3 and tensor.shape[1] == 5 else original(self, tensor, *arguments)

    with mock.patch.object(Group, "all_reduce", all_reduce):
        train(world, config)


def test_the_comparison_notices_what_is_missing(run_ranks: RunRanks, tmp_path: Path, alone: Path) -> None:
    run_ranks(2, train_without_sums, write_run(tmp_path, parallel__tp=2, **PROBED))
    found, wanted = records(tmp_path / "run", "probe")[0]["sites"], records(alone, "probe")[0]["sites"]
    wrong = {site for site in wanted if found[site]["variance"] != pytest.approx(wanted[site]["variance"], rel=1e-10)}
    assert wrong == {"q", "k", "v", "attention_output", "down_proj_input"}
