#!/usr/bin/env python3
"""Tokenize documents into Megatron's .bin/.idx format.

    python tools/preprocess_data.py --input data/*.jsonl.zst --tokenizer my_tokenizer --output tokens/train --workers 16

writes tokens/train_text_document.bin and .idx.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_ext.data.preprocess import ON_ERROR, Summary, preprocess
from megatron_ext.data.progress import show_progress
from megatron_ext.data.readers import ACCEPTED
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.errors import MegatronExtError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; the result is its exit status: 0, or 1 after an error of the input."""
    options = _parser().parse_args(arguments)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    try:
        tokenizer = load_tokenizer(options.tokenizer)
        with show_progress(console) as progress:
            summary = preprocess(
                options.input,
                tokenizer,
                options.output,
                keys=options.json_keys or [options.text_key],
                workers=options.workers,
                on_error=options.on_error,
                append_eod=options.append_eod,
                metadata=options.metadata,
                progress=progress,
            )
    except (MegatronExtError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console.print(_describe(summary, options.output))
    return 0


def _describe(summary: Summary, output: str) -> str:
    lines = [
        f"{key.prefix}.bin/.idx: {key.documents:,} documents, {key.tokens:,} tokens, "
        f"{key.num_bytes / max(key.tokens, 1):.2f} bytes/token, {key.empty:,} empty documents dropped"
        for key in summary.keys.values()
    ]
    if summary.skipped:
        lines.append(f"{summary.skipped:,} unreadable records skipped, listed in {output}.skipped.jsonl")
    rates = f"{summary.documents / summary.seconds:,.0f} documents/s, {summary.tokens / summary.seconds:,.0f} tokens/s"
    return "\n".join([*lines, f"{summary.seconds:.1f} s, {rates}"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, type=Path, metavar="PATH", help=f"files and folders: {ACCEPTED}")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="folder that transformers.AutoTokenizer loads")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX_KEY_document.bin and .idx for each key")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenize (default: 1)")
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument("--text-key", default="text", metavar="KEY", help="field of a record that is the document (default: text)")
    keys.add_argument("--json-keys", nargs="+", metavar="KEY", help="several fields, each of which becomes a set of its own")
    parser.add_argument(
        "--on-error", choices=ON_ERROR, default="fail", help="what to do with a record that cannot be read: stop, or count and list it"
    )
    parser.add_argument(
        "--append-eod", action=argparse.BooleanOptionalAction, default=True, help="end each document with the end-of-document token"
    )
    parser.add_argument(
        "--metadata",
        type=lambda text: text.replace("\\n", "\n"),
        metavar="TEMPLATE",
        help="also write PREFIX_KEY_metadata.bin and .idx: for each document a row of tokens of this text, with fields of the record in "
        "braces, as in 'URL: {url}\\n\\n' (\\n is a line break); empty where a field is blank",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
