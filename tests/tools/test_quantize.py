"""The command line that quantizes checkpoints, against transformers with PyTorch's own fake quantizers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from tests.data.byte_level import byte_level_backend
from tests.tools.loading import load_tool

TEXTS = [f"line {number}: the quick brown fox jumps over {number * 7} lazy dogs, again and again" for number in range(12)]


@pytest.fixture(scope="module")
def run() -> Callable[..., int]:
    """The tool as a function of its command line."""
    module = load_tool("quantize")
    return lambda *words: module.main([str(word) for word in words])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model with grouped queries, biases and gains, its tokenizer, and text beside it."""
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(**shape, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.3)
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    backend = byte_level_backend(pre_tokenizers.ByteLevel(add_prefix_space=False), TEXTS)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(directory)
    (directory / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return directory


class RoundedCache(DynamicCache):
    """Keys and values of each token and head as asymmetric integers of 4 bits, by PyTorch."""

    def update(self, key_states: Tensor, value_states: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return super().update(self._rounded(key_states), self._rounded(value_states), *rest, **options)

    def _rounded(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        low, high = rows.amin(1).clamp_max(0), rows.amax(1).clamp_min(0)
        scale = (high - low) / 15
        return torch.fake_quantize_per_channel_affine(rows, scale, (-low / scale).round().int(), 0, 0, 15).view(x.shape)


@torch.no_grad()
def transformers_loss(directory: Path, bits: int | None, cache: type[DynamicCache] = DynamicCache) -> float:
    """Mean loss of the texts, symmetric integers of ``bits`` by PyTorch in all linears of blocks."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    # Not AutoTokenizer, which replaces the pre-tokenizer beside the config.json of a Qwen2.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)

    def rounded(x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        scale = rows.abs().amax(1) / (2 ** (bits - 1) - 1)
        zeros = torch.zeros(len(rows), dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(rows, scale, zeros, 0, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).view(x.shape)

    for module in model.model.layers.modules():
        if bits is not None and isinstance(module, torch.nn.Linear):
            module.weight.data = rounded(module.weight.data)
            module.register_forward_pre_hook(lambda _, args: (rounded(args[0]),))
    total = tokens = 0.0
    for text in TEXTS:
        ids = torch.tensor([*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
        total += float(F.cross_entropy(model(ids[None], past_key_values=cache()).logits[0, :-1], ids[1:], reduction="sum"))
        tokens += len(ids) - 1
    return total / tokens


def losses_of(result: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(row["rotation"], row["scheme"]): row["loss"] for row in result["losses"]}


def test_losses_are_those_of_transformers(run: Callable[..., int], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    words = ("--model", model, "--data", model / "text.jsonl", "--output", output)
    assert run(*words, "--schemes", "W8A8", "w4a4", "nvfp4", "mxfp8", "--rotations", "none", "hadamard", "quarot", "--layers", "error") == 0
    result = json.loads(output.read_text())
    losses = losses_of(result)
    assert len(losses) == 3 * 5
    unquantized = transformers_loss(model, None)
    for rotation in ("none", "hadamard", "quarot"):
        assert losses[rotation, "unquantized"] == pytest.approx(unquantized, rel=2e-5)
        assert abs(losses[rotation, "W8A8"] - unquantized) < 0.05
    assert abs(losses["none", "W4A4"] - unquantized) > 0.2
    assert losses["none", "W8A8"] == pytest.approx(transformers_loss(model, 8), rel=3e-3)
    assert losses["none", "W4A4"] == pytest.approx(transformers_loss(model, 4), rel=3e-3)
    assert losses["quarot", "W4A4"] != losses["none", "W4A4"]
    for row in result["losses"]:
        before = losses[row["rotation"], "unquantized"]
        assert row["increase"] == pytest.approx(row["loss"] - before)
    assert len(result["linears"]) == 3 * 4 * 14
    assert result["tokens"] > 100 and result["sequence_length"] == 256
    assert result["settings"]["schemes"] == ["W8A8", "w4a4", "nvfp4", "mxfp8"]
    printed = capsys.readouterr().out
    for said in (
        "down_proj inputs 96 in blocks of 96",
        "residual stream 64 in blocks of 64",
        "the worst of 14 linears",
        "W4A4",
        "perplexity",
    ):
        assert said in printed


def test_keys_and_values_are_those_of_a_rounded_cache(run: Callable[..., int], model: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    schemes = ("W16A16KV4", "W8A8KV4", "W8A8")
    assert run("--model", model, "--data", model / "text.jsonl", "--output", output, "--schemes", *schemes) == 0
    losses = losses_of(json.loads(output.read_text()))
    rounded = {scheme: losses["none", scheme] for scheme in schemes}
    assert rounded["W16A16KV4"] == pytest.approx(transformers_loss(model, None, RoundedCache), rel=1e-4)
    assert rounded["W8A8KV4"] == pytest.approx(transformers_loss(model, 8, RoundedCache), rel=3e-3)
    assert abs(rounded["W16A16KV4"] - losses["none", "unquantized"]) > 1e-2
    assert abs(rounded["W8A8KV4"] - rounded["W8A8"]) > 1e-2


def test_options_change_what_they_say(run: Callable[..., int], model: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    words = ("--model", model, "--data", model / "text.jsonl", "--output", output, "--schemes", "W4A4")
    found = {}
    for options in ((), ("--asymmetric",), ("--clip-weights",), ("--dtype", "bfloat16"), ("--tokens", "50"), ("--sequence-length", "8")):
        assert run(*words, *options) == 0
        found[options] = json.loads(output.read_text())["losses"][1]["loss"]
    assert len(set(found.values())) == len(found)
    seeds = []
    for seed in ("1", "2", "1"):
        assert run(*words, "--rotations", "quarot", "--seed", seed, "--layers", "loss") == 0
        seeds.append(json.loads(output.read_text()))
    assert seeds[0]["losses"] == seeds[2]["losses"] != seeds[1]["losses"]
    increases = [each["increase"] for each in seeds[0]["linears"]]
    assert len(increases) == 14 and increases == sorted(increases, reverse=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--model": "nowhere"}, "nowhere/config.json does not exist; a Hugging Face model directory is needed"),
        ({"--data": "nowhere"}, "nowhere: accepted are the prefix of a .bin/.idx pair, and a file or folder of text; there is neither"),
        ({"--schemes": "int4"}, "quantization scheme 'int4'; accepted: WxAy or WxAyKVz with 2 to 8 or 16 (not quantized) bits"),
        ({"--tokens": "0"}, "--tokens 0 --sequence-length 2048; accepted: at least 1, at least 2"),
        ({"--output": "nowhere/result.json"}, "there is no directory nowhere"),
        ({"--tokenizer": "/"}, "not a tokenizer folder"),
    ],
)
def test_errors_say_what_is_accepted(
    changes: dict[str, str], message: str, run: Callable[..., int], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"--model": model, "--data": model / "text.jsonl", "--output": tmp_path / "result.json"} | changes
    assert run(*(word for pair in words.items() for word in pair)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "result.json").exists()
