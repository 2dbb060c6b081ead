#!/usr/bin/env python3
"""Join several .bin/.idx sets of one tokenizer to one.

python tools/merge_datasets.py --input tokens/a_text_document tokens/b_text_document --output tokens/all_text_document
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.data.indexed import IndexedDataset
from megatron_ext.data.indexed_writer import merge
from megatron_ext.errors import MegatronExtError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; the result is its exit status: 0, or 1 after an error of the input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="PREFIX", help="sets to join, without .bin/.idx, in this order")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="set to write, without .bin/.idx")
    options = parser.parse_args(arguments)
    try:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        merge(options.output, options.input)
        merged = IndexedDataset(options.output)
    except (MegatronExtError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}.bin/.idx: {len(merged):,} documents, {merged.num_tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
