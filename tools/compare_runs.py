#!/usr/bin/env python3
"""Where do two runs part? Compares their digests (logging.digests_every), step by step and tensor by tensor.

    python tools/compare_runs.py runs/first runs/second

Exit status: 0 if they are equal to the bit in all steps that both have, 1 if they part, 2 after an error of the input.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.config import changes, load_config, settings
from megatron_ext.errors import MegatronExtError
from megatron_ext.report.digests import cause, first_difference, read_digests
from megatron_ext.train.sources import CONFIG_FILE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; the result is its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="run directory")
    directories = parser.parse_args(arguments).runs
    try:
        one, other = map(read_digests, directories)
        found = first_difference(one, other)
        before, now = (settings(load_config(directory / CONFIG_FILE)) for directory in directories)
    except MegatronExtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    differing = changes(before, now)
    if found is None:
        common = sorted(one.steps.keys() & other.steps.keys())
        print(f"equal to the bit in {len(common)} steps, the first {common[0]}, the last {common[-1]}")
    else:
        print(f"{found}\nusual cause: {cause(found, one, other, [change.key for change in differing])}")
        print(_before(found.step, sorted(one.steps.keys() & other.steps.keys())))
    for change in differing:
        print(f"setting: {change}")
    return int(found is not None)


def _before(step: int, common: list[int]) -> str:
    equal = [each for each in common if each < step]
    return f"equal until step {equal[-1]}, the last with digests before" if equal else "no earlier step has digests of both"


if __name__ == "__main__":
    sys.exit(main())
