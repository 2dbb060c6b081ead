"""Whole training steps in each recipe of low precision, beside the step that quantizes nothing.

    python tools/bench_precision.py --config examples/configs/quickstart_pretrain.yaml tokenizer=null model.vocab_size=2048 \\
        precision.high_precision_first=0 precision.high_precision_last=0

A step is forward and backward of one pack of ``data.tokens_per_step`` and AdamW's update of float32 masters, at the size of the
configuration, in turn in one run. On devices without the products of a recipe they are emulated: then its numbers are those of the
format, and its time says what training in it costs there, not what it would save elsewhere. Printed with the device.
"""

import argparse
import time
from dataclasses import asdict
from typing import Any

import torch
from bench_ranks import print_ratios
from rich.progress import track

from megatron_ext.config import RunConfig, load_config
from megatron_ext.data.batch import PackedBatch
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.model.precision import linear_recipes, set_recipe
from megatron_ext.optim import AdamW
from megatron_ext.parallel.device import local_device, synchronize
from megatron_ext.precision.options import PrecisionOptions
from megatron_ext.precision.products import select_backends
from megatron_ext.precision.recipe import Recipe
from megatron_ext.precision.state import PrecisionState

RECIPES = ("bf16", "fp8_tensorwise", "fp8_rowwise", "fp8_blockwise", "mxfp8", "nvfp4", "mxfp4")


class Step:
    """A model with its optimizer, and what takes one step of it."""

    def __init__(self, model: ModelConfig, options: PrecisionOptions, pack: PackedBatch, device: torch.device, dtype: torch.dtype) -> None:
        self._pack, self._count = pack, 0
        self._network = GPT(model)
        self._network.reset_parameters(0)
        self._network.to(device, dtype)
        self._state = PrecisionState(seed=0)
        set_recipe(self._network, Recipe(options), self._state)
        self._masters = [parameter.detach().float().clone() for parameter in self._network.parameters()]
        self._rule = AdamW(self._masters)

    def __call__(self) -> None:
        """Take it."""
        self._count += 1
        self._state.begin_step(self._count, tokens=0)
        self._network(*self._pack.model_inputs)[0].backward()
        for master, parameter in zip(self._masters, self._network.parameters(), strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        self._rule.step()
        with torch.no_grad():
            for master, parameter in zip(self._masters, self._network.parameters(), strict=True):
                parameter.copy_(master)
        self._state.end_step()
        synchronize(self._pack.tokens.device)


def pack_of(config: RunConfig, vocab_size: int, device: torch.device) -> PackedBatch:
    """Documents of ``data.sequence_length`` random tokens."""
    length = config.data.sequence_length
    documents = config.data.tokens_per_step // length
    ids = torch.randint(vocab_size, (2, documents * length), device=device)
    positions = torch.arange(length, device=device).repeat(documents)
    boundaries = torch.arange(0, documents * length + 1, length, dtype=torch.int32, device=device)
    weight = torch.ones(documents * length, device=device)
    return PackedBatch(ids[0], ids[1], positions, boundaries, weight, torch.zeros_like(ids[0]), length)


def options_of(recipe: str, switches: dict[str, Any]) -> PrecisionOptions:
    """The options of a recipe with what the configuration says of high-precision blocks."""
    kept = {key: switches[key] for key in ("high_precision_first", "high_precision_last", "high_precision_names", "stash")}
    return PrecisionOptions(recipe=recipe, **kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of what is not quantized")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device, dtype = local_device(), getattr(torch, arguments.dtype)
    config = load_config(arguments.config, arguments.overrides)
    model = ModelConfig.from_options(config.model, config.model.vocab_size or 2048, config.data.sequence_length)
    pack = pack_of(config, model.vocab_size, device)
    recipes = {name: options_of(name, asdict(config.precision)) for name in RECIPES}
    for name, options in recipes.items():
        found = [recipe for recipe in linear_recipes(model, Recipe(options)).values() if recipe is not None]
        print(f"{name}: {len(found)} linears quantized" + (f", {select_backends(found[0], 'auto', device)}" if found else ""))
    steps = {name: Step(model, options, pack, device, dtype) for name, options in recipes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in track(range(-1, arguments.rounds), description="steps", transient=True):
        for name in list(steps)[:: 1 if number % 2 else -1]:
            begin = time.perf_counter()
            steps[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - begin)
    size = f"{model.num_parameters():,} parameters, {config.data.tokens_per_step:,} tokens"
    print_ratios(f"one training step, {size}, {arguments.dtype}, {device.type}", "recipe", "bf16", seconds, "seconds", "less")


if __name__ == "__main__":
    main()
