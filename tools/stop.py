#!/usr/bin/env python3
"""Ask a run to save a checkpoint at the end of its step and exit, without signals: through a file in the run directory.

    python tools/stop.py runs/pretrain

Start the same command again to continue.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.train.sources import CONFIG_FILE
from megatron_ext.train.stopping import request_stop


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; the result is its exit status: 0, or 1 if there is no such run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    run = parser.parse_args(arguments).run
    if not (run / CONFIG_FILE).is_file():
        print(f"error: {run} is no run directory: it has no {CONFIG_FILE}", file=sys.stderr)
        return 1
    try:
        path = request_stop(run)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {path}: the run saves a checkpoint at the end of its step and exits")
    return 0


if __name__ == "__main__":
    sys.exit(main())
