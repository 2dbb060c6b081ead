#!/usr/bin/env python
"""Bring a Hugging Face model in, or hand a checkpoint of a run out, as a clean Hugging Face directory; change the norms of a model, or
average several.

import: check that a Hugging Face directory is a model this package trains, store it as safetensors of one dtype, with its tokenizer.
        (``model.init_from`` also takes the original directory as it is.)
export: take the model and tokenizer of a checkpoint directory (step_XXXXXXXX) and leave the optimizer and the trainer's state behind.
        SSNorm, scaling by depth, projections and norms of embeddings are folded into the weights of a plain Llama; what cannot be folded
        is refused.
renorm: take a model with LayerNorm before attention and MLP and write the same function with RMSNorm, or with CRMSNorm, which computes on
        one channel less (Jiang et al. 2023, arXiv:2305.14858). ``model.init_from`` takes the result.
average: take the mean of the weights of models of one shape, such as checkpoints of a constant learning rate: equal, with --weights, or
        with --ema, which takes them oldest first. It is computed in float64, one tensor at a time.
"""

import argparse
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_ext.atomic_io import fsync_directory, write_json
from megatron_ext.checkpoint.average import common_config, ema_weights, weighted_mean
from megatron_ext.checkpoint.fold import Read, fold
from megatron_ext.checkpoint.hf import hf_tensor_reader, in_order, load_hf_config, read_hf_json, save_hf
from megatron_ext.checkpoint.load import check_undamaged
from megatron_ext.checkpoint.manifest import STATE_FILE
from megatron_ext.checkpoint.own_config import no_family_has
from megatron_ext.checkpoint.renorm import layer_to_rms, rms_to_crms
from megatron_ext.errors import CheckpointError, ConfigError, MegatronExtError
from megatron_ext.model.config import ModelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Files that transformers keeps beside the weights: the tokenizer, and defaults for generation."""


Conversion = Callable[[Read, ModelConfig], tuple[Read, ModelConfig]]


def to_family(read: Read, config: ModelConfig) -> tuple[Read, ModelConfig]:
    """A model that a Hugging Face family has; raises CheckpointError where there is none."""
    return fold(read, config) if no_family_has(config) else (read, config)


def to_crms(read: Read, config: ModelConfig) -> tuple[Read, ModelConfig]:
    """A model with CRMSNorm instead of LayerNorm, or instead of the RMSNorm that ``layer_to_rms`` makes of it."""
    return rms_to_crms(*(layer_to_rms(read, config) if config.norm.kind == "layer" else (read, config)))


def convert(source: Path, target: Path, dtype: str | None, max_shard_bytes: int, conversion: Conversion) -> None:
    """Write what ``conversion`` makes of the model of ``source`` to the new directory ``target``.

    ``dtype`` None keeps the one that config.json names.
    """
    with new_directory(target) as beside:
        check_undamaged(source)
        config = load_hf_config(source)
        read, config = conversion(hf_tensor_reader(source, config), config)
        store(read, config, source, beside, dtype, max_shard_bytes)
    announce(target, config)


def average(sources: Sequence[Path], target: Path, dtype: str | None, max_shard_bytes: int, weights: Sequence[float]) -> None:
    """Write the weighted mean of the models of ``sources`` to the new directory ``target``, with the tokenizer of the last.

    Which models they were, and their weights, is in averaged.json there. ``dtype`` None keeps that of the last.
    """
    with new_directory(target) as beside:
        config = common_config(sources)
        for source in sources:
            check_undamaged(source)
        read = weighted_mean([hf_tensor_reader(source, config) for source in sources], weights)
        store(read, config, sources[-1], beside, dtype, max_shard_bytes)
        shares = [weight / sum(weights) for weight in weights]
        write_json(beside / "averaged.json", {"sources": [str(source) for source in sources], "weights": shares})
    announce(target, config)


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory beside ``target`` that gets its name when the block ends, and vanishes if it ends by an error."""
    if target.exists():
        raise CheckpointError(f"{target} exists; name a directory that does not")
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield beside
        fsync_directory(beside)
        beside.rename(target)
        fsync_directory(target.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def store(read: Read, config: ModelConfig, source: Path, directory: Path, dtype: str | None, max_shard_bytes: int) -> None:
    """Write a model into ``directory``, with the dtype (unless one is given), special tokens and companions of that in ``source``."""
    hf = read_hf_json(source)
    dtype = dtype or hf.get("dtype") or hf.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise CheckpointError(f"{source / 'config.json'}: dtype is {dtype!r}; pass --dtype with one of {', '.join(DTYPES)}")
    ids = {key: hf.get(key) for key in ("bos_token_id", "eos_token_id")}
    save_hf(in_order(read, config), config, directory, max_shard_bytes, dtype=DTYPES[dtype], **ids)
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def announce(target: Path, config: ModelConfig) -> None:
    """Say what was written."""
    print(f"{target}: {config.num_parameters():,} parameters as {read_hf_json(target)['dtype']}")


IMPORT = "import"
EXPORT = "export"
RENORM = "renorm"
AVERAGE = "average"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    max_shard_bytes = int(options.max_shard_gib * 2**30)
    try:
        if options.direction == AVERAGE:
            average(options.sources, options.output, options.dtype, max_shard_bytes, _weights(options))
        else:
            convert(options.source, options.target, options.dtype, max_shard_bytes, _conversion(options))
    except MegatronExtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _conversion(options: argparse.Namespace) -> Conversion:
    if options.direction == RENORM:
        return {"rms": layer_to_rms, "crms": to_crms}[options.kind]
    if options.direction == IMPORT:
        return lambda read, config: (read, config)
    if not (options.source / STATE_FILE).is_file():
        raise CheckpointError(f"{options.source} has no {STATE_FILE}, so it is no checkpoint of a run; a step_XXXXXXXX directory is")
    return to_family


def _weights(options: argparse.Namespace) -> list[float]:
    """The weight of each model that is averaged."""
    count = len(options.sources)
    if count < 2:
        raise ConfigError(f"average: {count} model; accepted: two or more")
    if options.ema is not None:
        if not 0 <= options.ema < 1:
            raise ConfigError(f"--ema {options.ema}; accepted: at least 0 and less than 1")
        return ema_weights(count, options.ema)
    weights = options.weights or [1.0] * count
    if len(weights) != count or not all(0 <= weight < math.inf for weight in weights) or not sum(weights):
        words = " ".join(f"{weight:g}" for weight in weights)
        raise ConfigError(f"--weights {words}; accepted: {count} numbers, one a model, at least 0 and not all 0")
    return weights


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    directions = parser.add_subparsers(dest="direction", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--dtype", choices=tuple(DTYPES), help="of the stored weights; default: the one that config.json names")
    common.add_argument("--max-shard-gib", type=float, default=4.0, help="largest size of one file (default %(default)s)")
    for name in (IMPORT, EXPORT, RENORM):
        direction = directions.add_parser(name, parents=[common])
        direction.add_argument("source", type=Path, metavar="SRC")
        direction.add_argument("target", type=Path, metavar="DST", help="a directory that does not exist yet")
        if name == RENORM:
            direction.add_argument("--kind", choices=("rms", "crms"), required=True, help="of the norms")
    direction = directions.add_parser(AVERAGE, parents=[common])
    direction.add_argument("sources", type=Path, nargs="+", metavar="MODEL", help="Hugging Face or step_XXXXXXXX directories, oldest first")
    direction.add_argument("--output", type=Path, required=True, metavar="DST", help="a directory that does not exist yet")
    shares = direction.add_mutually_exclusive_group()
    shares.add_argument("--weights", type=float, nargs="+", metavar="W", help="one a model; default: all alike")
    shares.add_argument(
        "--ema", type=float, metavar="DECAY", help="exponential moving average: each further model adds 1 - DECAY of itself"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
