"""Estimate the memory of a run's ranks, and find the grids that fit a device.

    python tools/estimate_memory.py --config examples/configs/quickstart_pretrain.yaml --devices 8 --gib 80 parallel.tp=2

Nothing is trained and no data are read: the numbers follow from shapes. Not counted: the context of the device, fragmentation, and what
other programs use.
"""

import argparse
import sys
from dataclasses import fields

import torch

from megatron_ext.config import RunConfig, load_config
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.errors import MegatronExtError
from megatron_ext.model.config import ModelConfig
from megatron_ext.parallel.device import choose_dtype, estimated_device
from megatron_ext.train.build import model_config
from megatron_ext.train.memory import RankMemory, grids, largest_rank

GIB = 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    parser.add_argument("--devices", type=int, default=1, help="number of ranks (default: 1)")
    parser.add_argument("--gib", type=float, help="memory of a device in GiB; grids that need more are marked")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="kind of device (default: a GPU with --gib, else this machine's)")
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
        tokenizer = None if config.model.vocab_size or config.model.init_from else load_tokenizer(config.tokenizer)
        model = model_config(config, tokenizer.vocab_size if tokenizer else None)
        device = estimated_device(arguments.device, arguments.gib)
        print(table(config, model, arguments.devices, arguments.gib, device))
    except MegatronExtError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def table(config: RunConfig, model: ModelConfig, devices: int, gib: float | None, device: torch.device) -> str:
    """A line for each grid, the ones that fit first, of those the ones with most data parallelism first."""
    dtype, _ = choose_dtype(config.train.dtype, device)
    found = [(shape, *largest_rank(config, model, shape, dtype, device)) for shape in grids(config, model, devices)]
    found.sort(key=lambda row: gib is not None and row[2].total > gib * GIB)
    columns = [field.name for field in fields(RankMemory)]
    lines = [f"{'grid':<22} {'stage':>5} " + " ".join(f"{name:>11}" for name in [*columns, "total"]) + "   GiB of the rank that needs most"]
    for shape, stage, memory in found:
        values = [getattr(memory, name) for name in columns] + [memory.total]
        fits = "" if gib is None else "   fits" if memory.total <= gib * GIB else "   too large"
        lines.append(f"{shape!s:<22} {stage:>5} " + " ".join(f"{value / GIB:>11.4g}" for value in values) + fits)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
