#!/usr/bin/env python3
"""Train a byte-pair tokenizer on documents.

python tools/train_tokenizer.py --input data/*.jsonl --vocab-size 32000 --output my_tokenizer
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ext.data.blocks import Fault
from megatron_ext.data.preprocess import ON_ERROR
from megatron_ext.data.readers import ACCEPTED, read_documents
from megatron_ext.data.tokenizer_training import train_tokenizer
from megatron_ext.errors import DataError, MegatronExtError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; the result is its exit status: 0, or 1 after an error of the input."""
    options = _parser().parse_args(arguments)
    try:
        texts = _texts(options.input, options.json_keys or [options.text_key], skip=options.on_error == "skip")
        train_tokenizer(
            texts,
            options.vocab_size,
            options.output,
            character_coverage=options.character_coverage,
            max_lines=options.max_lines,
        )
    except (MegatronExtError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: tokenizer of {options.vocab_size:,} tokens")
    return 0


def _texts(inputs: Sequence[Path], keys: Sequence[str], skip: bool) -> Iterator[str]:
    """All texts of all documents; what cannot be read is an error or is named on stderr."""
    for document in read_documents(inputs, keys):
        if not isinstance(document, Fault):
            yield from document
        elif skip:
            print(f"skipped: {document}", file=sys.stderr)
        else:
            raise DataError(str(document))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, type=Path, metavar="PATH", help=f"files and folders: {ACCEPTED}")
    parser.add_argument("--vocab-size", required=True, type=int, metavar="N", help="tokens, with 4 special ones and 256 bytes")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument("--text-key", default="text", metavar="KEY", help="field of a record that is the document (default: text)")
    keys.add_argument("--json-keys", nargs="+", metavar="KEY", help="several fields")
    parser.add_argument("--on-error", choices=ON_ERROR, default="fail", help="stop at a record that cannot be read, or name and skip it")
    parser.add_argument("--character-coverage", type=float, default=0.9995, metavar="SHARE", help="of characters with a token of their own")
    parser.add_argument("--max-lines", type=int, default=5_000_000, metavar="N", help="learn from a random sample of at most N lines")
    return parser


if __name__ == "__main__":
    sys.exit(main())
