#!/usr/bin/env python3
"""Loss of a checkpoint before and after quantization, without any training.

    python tools/quantize.py --model runs/pretrain/checkpoints/step_00001000 --data runs/pretrain/data/valid_text_document \
        --schemes W8A8 W4A4 nvfp4 --rotations none hadamard quarot --layers error

Weights and inputs of the linears inside blocks, and keys and values where the scheme says so (W4A4KV4), are rounded to nearest. All
rotations compute the same, which their unquantized losses show.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_ext.atomic_io import write_json
from megatron_ext.errors import ConfigError, MegatronExtError
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.parallel.device import DTYPES, describe, local_device
from megatron_ext.precision.post_training import ACCEPTED, Scheme, named_scheme
from megatron_ext.train.evaluation_packs import evaluation_packs
from megatron_ext.train.quantized_evaluation import linear_errors, linear_losses, quantized_losses
from megatron_ext.train.quantized_model import ROTATIONS, build_rotated, read_weights, rotation_blocks

WORST_SHOWN = 10
EVALUATION_DTYPES = ("float32", "bfloat16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; the result is its exit status: 0, or 1 after an error of the input."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False, markup=False)
    try:
        schemes = [named_scheme(name, asymmetric=options.asymmetric, clip_weights=options.clip_weights) for name in options.schemes]
        _check(options)
        result = _evaluate(options, schemes, console)
        write_json(options.output, result)
    except (MegatronExtError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console.print(f"results: {options.output}", soft_wrap=True)
    return 0


def _check(options: argparse.Namespace) -> None:
    if options.tokens < 1 or options.sequence_length < 2:
        raise ConfigError(f"--tokens {options.tokens} --sequence-length {options.sequence_length}; accepted: at least 1, at least 2")
    if not options.output.absolute().parent.is_dir():
        raise ConfigError(f"--output {options.output}: there is no directory {options.output.parent}")


def _evaluate(options: argparse.Namespace, schemes: Sequence[Scheme], console: Console) -> dict[str, Any]:
    """Evaluate what is asked for, print it, and give it for JSON."""
    device = local_device()
    weights, config = read_weights(options.model)
    length = min(options.sequence_length, config.max_position)
    packs = evaluation_packs(options.data, options.tokenizer or options.model, length, options.tokens, config.vocab_size)
    packs = [pack.to(device) for pack in packs]
    tokens = int(sum(float(pack.loss_weight.sum()) for pack in packs))
    console.print(f"{options.model}: {tokens:,} tokens of {options.data}, {options.dtype}, {describe(device)}", soft_wrap=True)
    rows: list[dict[str, Any]] = []
    linears: list[dict[str, Any]] = []
    for rotation in options.rotations:
        console.print(_described(rotation, config), soft_wrap=True)
        model = build_rotated(weights, config, rotation, options.seed, device, DTYPES[options.dtype])
        losses = [asdict(each) for each in quantized_losses(model, schemes, packs)]
        rows += [{"rotation": rotation, **each, "perplexity": _perplexity(each["loss"])} for each in losses]
        for scheme in schemes if options.layers else ():
            found = _by_linear(options.layers, model, scheme, packs, losses[0]["loss"])
            console.print(_table(f"{rotation}, {scheme.name}: the worst of {len(found)} linears", found[:WORST_SHOWN]))
            linears += [{"rotation": rotation, "scheme": scheme.name, **each} for each in found]
    console.print(_table("Loss in nats a token", rows))
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    return {"settings": settings, "sequence_length": length, "tokens": tokens, "losses": rows, "linears": linears}


def _by_linear(measure: str, model: GPT, scheme: Scheme, packs: Sequence[Any], before: float) -> list[dict[str, Any]]:
    found = linear_errors(model, scheme, packs) if measure == "error" else linear_losses(model, scheme, packs, before)
    return [asdict(each) for each in found]


def _described(rotation: str, config: ModelConfig) -> str:
    blocks = ", ".join(f"{what} {size} in blocks of {block}" for what, size, block in rotation_blocks(config, rotation))
    return f"{rotation}: {ROTATIONS[rotation]}" + (f" ({blocks})" if blocks else "")


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=title)
    for name, value in rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right", overflow="fold")
    for row in rows:
        table.add_row(
            *(value if isinstance(value, str) else f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}" for value in row.values())
        )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="Hugging Face directory, such as a checkpoint of a run")
    parser.add_argument("--data", required=True, metavar="PATH", help="prefix of a .bin/.idx pair, or a text or JSON lines file or folder")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="of text (default: the one in the directory of the model)")
    parser.add_argument("--schemes", nargs="+", default=["W8A8", "W4A4"], metavar="NAME", help=f"{ACCEPTED} (default: W8A8 W4A4)")
    rotations = "; ".join(f"{name}: {what}" for name, what in ROTATIONS.items())
    parser.add_argument("--rotations", nargs="+", choices=tuple(ROTATIONS), default=["none"], help=f"{rotations} (default: none)")
    parser.add_argument("--asymmetric", action="store_true", help="integers of activations between the least and the largest of a token")
    parser.add_argument("--clip-weights", action="store_true", help="search for the scales of integer weights, which clips the largest")
    parser.add_argument(
        "--layers",
        choices=("error", "loss"),
        help="also rank the linears: by the relative error of their outputs, in one pass, or by the loss when only one is quantized",
    )
    parser.add_argument("--tokens", type=int, default=65536, metavar="N", help="to evaluate on (default: %(default)s)")
    parser.add_argument(
        "--sequence-length",
        type=int,
        default=2048,
        metavar="N",
        help="of a piece of a document, at most what the model takes (default: 2048)",
    )
    parser.add_argument(
        "--dtype", choices=EVALUATION_DTYPES, default="float32", help="of everything that is not quantized (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the signs that turn the residual stream (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("quantization.json"), metavar="FILE", help="JSON (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
