"""Context extension of a checkpoint: which positions a run has, what it says about them, and that its export is that model."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from megatron_ext.checkpoint.hf import load_hf_config, load_hf_weights, save_hf
from megatron_ext.checkpoint.hf_config import config_to_hf
from megatron_ext.errors import CheckpointError
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.model.options import ModelOptions
from megatron_ext.model.rope_options import RopeOptions
from megatron_ext.model.rope_scaling import RopeScaling
from megatron_ext.option_rules import OptionError
from megatron_ext.train.positions import describe_positions, extended
from tests.distributed import RunRanks
from tests.train.test_trainer import CHECKPOINTS
from tests.train.tiny_run import VOCAB, losses, records, train, write_run

TRAINED = ModelConfig(VOCAB, 32, 48, 2, 4, 2, 8, max_position=16, rope_theta=1e4, init_std=0.2)
PLAIN = config_to_hf(TRAINED, dtype="float32")
LLAMA = {**PLAIN, "max_position_embeddings": 256, "rope_parameters": None}
LLAMA["rope_scaling"] = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}


def model(hf: dict[str, Any], sequence_length: int = 64, **keys: Any) -> ModelConfig:
    return extended(hf, ModelOptions(init_from="hf", **keys), sequence_length)


def positions(config: ModelConfig) -> tuple[float, RopeScaling, int]:
    return config.rope_theta, config.rope, config.max_position


def test_what_is_not_set_is_that_of_the_checkpoint() -> None:
    assert positions(model(PLAIN, sequence_length=8)) == (1e4, RopeScaling(), 16)
    assert positions(model(LLAMA)) == (1e4, RopeScaling("llama3", 8.0, 32), 256)
    assert model(PLAIN).max_position == 64, "documents of the run are longer than the checkpoint promises"
    assert positions(model(PLAIN, rope_theta=5e5, max_position=128)) == (5e5, RopeScaling(), 128)
    assert positions(model(LLAMA, rope_theta=5e5)) == (5e5, RopeScaling("llama3", 8.0, 32), 256), "each key by itself"


def test_scaling_begins_from_the_longest_position_of_the_checkpoint() -> None:
    assert positions(model(PLAIN, rope=RopeOptions("linear"))) == (1e4, RopeScaling("linear", 4.0), 64)
    assert positions(model(PLAIN, rope=RopeOptions("linear", 8.0))) == (1e4, RopeScaling("linear", 8.0), 128)
    assert positions(model(PLAIN, max_position=512, rope=RopeOptions("llama3"))) == (1e4, RopeScaling("llama3", 32.0, 16), 512)
    yarn = model(PLAIN, rope_theta=5e5, rope=RopeOptions("yarn", original_max_position=32))
    assert (yarn.rope_theta, yarn.rope.kind, yarn.rope.factor, yarn.rope.original_max_position) == (5e5, "yarn", 2.0, 32)
    ntk = model(PLAIN, rope=RopeOptions("ntk"))
    assert positions(ntk) == (pytest.approx(1e4 * 4 ** (8 / 6)), RopeScaling(), 64)
    assert config_to_hf(ntk, dtype="float32")["rope_parameters"] == {"rope_type": "default", "rope_theta": ntk.rope_theta}


def test_a_scaled_checkpoint_can_be_scaled_anew_but_not_by_guessing() -> None:
    with pytest.raises(OptionError, match=r"model.rope.original_max_position: null; accepted: a number of tokens"):
        model(LLAMA, rope=RopeOptions("yarn", 4.0))
    assert model(LLAMA, rope=RopeOptions("yarn", 4.0, 32)).rope.original_max_position == 32
    assert positions(model(LLAMA, rope=RopeOptions("default"))) == (1e4, RopeScaling(), 256)
    dynamic = {**LLAMA, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    with pytest.raises(CheckpointError, match=r"rope_type 'dynamic'.*model.rope with kind ntk"):
        model(dynamic)
    assert model(dynamic, rope=RopeOptions("ntk", 2.0)).rope_theta == pytest.approx(1e4 * 2 ** (8 / 6))


@pytest.mark.parametrize(
    ("hf", "keys", "said"),
    [
        (PLAIN, {"max_position": 16}, {}),
        (PLAIN, {"max_position": 128}, {"positions": "up to 128, base 10,000; in the checkpoint up to 16, base 10,000"}),
        (PLAIN, {"rope_theta": 5e5, "max_position": 16}, {"positions": "up to 16, base 500,000; in the checkpoint up to 16, base 10,000"}),
        (LLAMA, {}, {"positions": "up to 256, base 10,000, llama3: factor 8 of 32"}),
        (
            PLAIN,
            {"rope": RopeOptions("yarn", 4.0)},
            {"positions": "up to 64, base 10,000, yarn: factor 4 of 16, attention factor 1.139; in the checkpoint up to 16, base 10,000"},
        ),
        (
            LLAMA,
            {"rope": RopeOptions("ntk", 4.0)},
            {"positions": "up to 256, base 63,496.042 by ntk; in the checkpoint up to 256, base 10,000, llama3"},
        ),
    ],
)
def test_the_banner_says_what_changes(tmp_path: Path, hf: dict[str, Any], keys: dict[str, Any], said: dict[str, str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf))
    options = ModelOptions(init_from=str(tmp_path), **keys)
    assert describe_positions(options, extended(hf, options, 16)) == said
    assert describe_positions(ModelOptions(), TRAINED) == {}


def write_tokenizer(folder: Path) -> None:
    """One token for each number below ``VOCAB``."""
    backend = Tokenizer(models.WordLevel({str(number): number for number in range(VOCAB)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="0").save_pretrained(folder)


@torch.no_grad()
def mean_losses(directory: Path, tokens: torch.Tensor) -> tuple[float, float]:
    """By transformers and by the model of this package."""
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    ours = GPT(load_hf_config(directory), "sdpa")
    load_hf_weights(ours, directory)
    ends = torch.tensor([0, len(tokens)], dtype=torch.int32)
    logits = [theirs(tokens[None]).logits[0], ours.logits(tokens, torch.arange(len(tokens)), ends, len(tokens))]
    return tuple(float(torch.nn.functional.cross_entropy(each[:-1], tokens[1:])) for each in logits)


def test_a_run_extends_a_checkpoint_and_exports_it(run_ranks: RunRanks, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trained = GPT(TRAINED, "dense")
    trained.reset_parameters(3)
    save_hf(trained.named_parameters(), TRAINED, tmp_path / "hf", 2**30, dtype=torch.float32)
    write_tokenizer(tmp_path / "hf")
    model = {"init_from": str(tmp_path / "hf"), "rope": {"kind": "yarn"}}
    run_ranks(1, train, write_run(tmp_path, model=model, train__steps=1, schedule__warmup_steps=0))
    said = r"positions +up to 32, base 10,000, yarn: factor 2 of 16, attention factor 1.069; in the checkpoint up to 16, base 10,000\n"
    assert re.search(said, capfd.readouterr().out)

    exported = tmp_path / CHECKPOINTS / "step_00000001"
    assert load_hf_config(exported).rope.kind == "yarn"
    theirs, ours = mean_losses(exported, torch.randint(0, VOCAB, (48,), generator=torch.Generator().manual_seed(5)))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_scaled_positions_give_the_same_losses_on_every_grid(run_ranks: RunRanks, tmp_path: Path) -> None:
    keys = {"model__init_std": 0.2, "train__dtype": "float64", "train__steps": 2, "checkpoint__every": None}
    yarn = {"model__rope": {"kind": "yarn", "original_max_position": 8}}
    shared = {"planning__policy": "static", "planning__degree": 2, "planning__tokens_per_pack": 16}
    grids = {"alone": (1, {}), "pp": (2, {"parallel__pp": 2}), "tp": (2, {"parallel__tp": 2}), "shared": (2, shared)}
    for name, (ranks, changes) in grids.items():
        run_ranks(ranks, train, write_run(tmp_path / name, **keys, **yarn, **changes))
    run_ranks(1, train, write_run(tmp_path / "unscaled", **keys))
    for name in grids:
        assert losses(tmp_path / name / "run") == pytest.approx(losses(tmp_path / "alone/run"), rel=1e-10, abs=0)
    assert losses(tmp_path / "unscaled/run")[1] != pytest.approx(losses(tmp_path / "alone/run")[1], rel=1e-4), "scaling is seen"


def test_scaled_positions_go_around_a_ring(run_ranks: RunRanks, tmp_path: Path) -> None:
    one_head = {"model__num_heads": 1, "model__num_kv_heads": 1, "model__init_std": 0.2}
    yarn = {
        "model__rope": {"kind": "yarn", "original_max_position": 8},
        "train__dtype": "float64",
        "train__steps": 1,
        "schedule__warmup_steps": 0,
    }
    ring = {"planning__policy": "static", "planning__degree": 2, "planning__largest_degree": 2, "planning__tokens_per_pack": 16}
    run_ranks(1, train, write_run(tmp_path / "alone", **one_head, **yarn))
    run_ranks(2, train, write_run(tmp_path / "ring", **one_head, **yarn, **ring))
    assert losses(tmp_path / "ring/run") == pytest.approx(losses(tmp_path / "alone/run"), rel=1e-10, abs=0)
    assert {pack[2] for plan in records(tmp_path / "ring/run", "plan") for pack in plan["packs"]} == {2}, "in rings of two"
