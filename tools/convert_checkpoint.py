#!/usr/bin/env python
"""Bring a Hugging Face model in, or hand a checkpoint of a run out, as a clean Hugging Face directory; or change the norms of a model.

import: check that a Hugging Face directory is a model this package trains, store it as safetensors of one dtype, with its tokenizer.
        (``model.init_from`` also takes the original directory as it is.)
export: take the model and tokenizer of a checkpoint directory (step_XXXXXXXX) and leave the optimizer and the trainer's state behind.
        SSNorm, scaling by depth, projections and norms of embeddings are folded into the weights of a plain Llama; what cannot be folded
        is refused.
renorm: take a model with LayerNorm before attention and MLP and write the same function with RMSNorm, or with CRMSNorm, which computes on
        one channel less (Jiang et al. 2023, arXiv:2305.14858). ``model.init_from`` takes the result.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from megatron_ext.atomic_io import fsync_directory
from megatron_ext.checkpoint.fold import Read, fold
from megatron_ext.checkpoint.hf import hf_tensor_reader, in_order, read_hf_json, save_hf
from megatron_ext.checkpoint.hf_config import config_from_hf
from megatron_ext.checkpoint.own_config import no_family_has
from megatron_ext.checkpoint.renorm import layer_to_rms, rms_to_crms
from megatron_ext.errors import CheckpointError, MegatronExtError
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
    if target.exists():
        raise CheckpointError(f"{target} exists; name a directory that does not")
    hf = read_hf_json(source)
    config = config_from_hf(hf)
    dtype = dtype or hf.get("dtype") or hf.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise CheckpointError(f"{source / 'config.json'}: dtype is {dtype!r}; pass --dtype with one of {', '.join(DTYPES)}")
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        read, config = conversion(hf_tensor_reader(source, config), config)
        ids = {key: hf.get(key) for key in ("bos_token_id", "eos_token_id")}
        save_hf(in_order(read, config), config, beside, max_shard_bytes, dtype=DTYPES[dtype], **ids)
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, beside / name)
        fsync_directory(beside)
        beside.rename(target)
        fsync_directory(target.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    print(f"{target}: {config.num_parameters():,} parameters as {dtype}")


CONVERSIONS: Mapping[tuple[str, str | None], Conversion] = {
    ("import", None): lambda read, config: (read, config),
    ("export", None): to_family,
    ("renorm", "rms"): layer_to_rms,
    ("renorm", "crms"): to_crms,
}
"""By direction and kind of norm."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("direction", choices=("import", "export", "renorm"))
    parser.add_argument("source", type=Path, metavar="SRC")
    parser.add_argument("target", type=Path, metavar="DST", help="a directory that does not exist yet")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the stored weights; default: the one that config.json names")
    parser.add_argument("--kind", choices=("rms", "crms"), help="of the norms that renorm makes; needed with it and by nothing else")
    parser.add_argument("--max-shard-gib", type=float, default=4.0, help="largest size of one file (default %(default)s)")
    options = parser.parse_args(arguments)
    if (options.direction, options.kind) not in CONVERSIONS:
        parser.error(f"--kind is {options.kind or 'missing'}; accepted with renorm: rms, crms; with all else it is left out")
    try:
        if options.direction == "export" and not (options.source / "trainer_state.json").is_file():
            raise CheckpointError(
                f"{options.source} has no trainer_state.json, so it is no checkpoint of a run; a step_XXXXXXXX directory is"
            )
        conversion = CONVERSIONS[options.direction, options.kind]
        convert(options.source, options.target, options.dtype, int(options.max_shard_gib * 2**30), conversion)
    except MegatronExtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
