"""Pretrain, or continue the pretraining of, a language model.

    deepspeed --num_gpus 8 examples/pretrain.py --config examples/configs/quickstart_pretrain.yaml optimizer.lr=3e-4

Started without a launcher it runs in one process.
"""

import argparse
import os
import sys
import traceback

from megatron_ext.config import load_config
from megatron_ext.errors import MegatronExtError
from megatron_ext.train import dry_run, pretrain


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, such as optimizer.lr=3e-4")
    parser.add_argument("--dry-run", action="store_true", help="print configuration, token budget, layout and memory, and exit")
    parser.add_argument("--ranks", type=int, metavar="N", help="with --dry-run: lay the run out for so many ranks")
    parser.add_argument("--gib", type=float, metavar="X", help="with --dry-run: memory of a device; says whether the run fits")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="with --dry-run: kind of device (default: a GPU with --gib, else this machine's)"
    )
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            print(dry_run(config, arguments.ranks, arguments.gib, arguments.device))
        else:
            pretrain(config)
    except MegatronExtError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    # DeepSpeed keeps process groups alive whose threads now and then abort the interpreter while it ends: a whole run would look failed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
