#!/usr/bin/env python3
"""Compare the speed of preprocessing with a plain ``datasets.map`` and the same tokenizer, documents and number of workers.

    python tools/bench_preprocessing.py --workers 2

The time of ``preprocess`` is from JSON lines on disk to a finished .bin/.idx. The time of ``datasets.map`` begins when the JSON is already
loaded, and ends with the tokens in its Arrow cache. The two take turns, and each pair of runs gives a ratio. Nothing is left on disk.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from megatron_ext.data.indexed import IndexedDataset
from megatron_ext.data.preprocess import preprocess
from megatron_ext.data.readers import read_documents
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.data.tokenizer_training import train_tokenizer
from megatron_ext.errors import DataError, MegatronExtError

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; the result is its exit status: 0, or 1 after an error of the input."""
    options = _parser().parse_args(arguments)
    datasets.disable_progress_bars()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # workers are the parallelism, on both sides
    with tempfile.TemporaryDirectory() as scratch:
        try:
            _bench(options, Path(scratch))
        except (MegatronExtError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


def _bench(options: argparse.Namespace, scratch: Path) -> None:
    inputs = options.input or _standard_library(scratch / "corpus")
    folder = options.tokenizer or scratch / "tokenizer"
    if options.tokenizer is None:
        train_tokenizer((_text(document) for document in read_documents(inputs)), options.vocab_size, folder)
    ours, theirs = _our_run(inputs, folder, options.workers, scratch), _their_run(inputs, folder, options.workers, scratch)
    documents = _check_equal(ours(), theirs())  # also the warm-up
    seconds = []
    for number in range(options.repeats):
        order = (ours, theirs) if number % 2 == 0 else (theirs, ours)
        taken = {run: _seconds(run) for run in order}
        seconds.append((taken[ours], taken[theirs]))
    _print(documents, seconds, options.workers)


def _standard_library(folder: Path) -> list[Path]:
    subprocess.run([sys.executable, ROOT / "examples" / "build_corpus.py", "--output", folder], check=True, stdout=subprocess.DEVNULL)
    return sorted(folder.iterdir())


def _text(document: object) -> str:
    if not isinstance(document, tuple):
        raise DataError(str(document))
    return document[0]


def _our_run(inputs: Sequence[Path], folder: Path, workers: int, scratch: Path) -> Callable[[], IndexedDataset]:
    tokenizer = load_tokenizer(folder)

    def run() -> IndexedDataset:
        summary = preprocess(inputs, tokenizer, scratch / "ours", workers=workers, append_eod=False)
        return IndexedDataset(summary.keys["text"].prefix)

    return run


def _their_run(inputs: Sequence[Path], folder: Path, workers: int, scratch: Path) -> Callable[[], datasets.Dataset]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [text for document in read_documents(inputs) if (text := _text(document)).strip()]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(scratch / "loaded")
    loaded = datasets.load_from_disk(str(scratch / "loaded"))

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]}

    def run() -> datasets.Dataset:
        cache = scratch / "theirs.arrow"
        return loaded.map(
            tokenize, batched=True, num_proc=workers, remove_columns=["text"], load_from_cache_file=False, cache_file_name=str(cache)
        )

    return run


def _check_equal(ours: IndexedDataset, theirs: datasets.Dataset) -> int:
    """The number of documents, if all their tokens are the same."""
    for number, row in enumerate(theirs):
        if not np.array_equal(ours.tokens(number), row["input_ids"]):
            raise DataError(f"document {number}: the tokens differ")
    if len(ours) != len(theirs):
        raise DataError(f"{len(ours)} documents, expected {len(theirs)}")
    return len(ours)


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _print(documents: int, seconds: Sequence[tuple[float, float]], workers: int) -> None:
    table = Table()
    for column in ("", "min", "median", "max"):
        table.add_column(column, justify="right" if column else "left")
    rows = {
        "preprocess, documents/s": [documents / ours for ours, _ in seconds],
        "datasets.map, documents/s": [documents / theirs for _, theirs in seconds],
        "ratio": [theirs / ours for ours, theirs in seconds],
    }
    for name, values in rows.items():
        table.add_row(name, *(f"{statistic(values):,.2f}" for statistic in (min, statistics.median, max)))
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{documents:,} documents, {workers} workers, {len(seconds)} pairs of runs, tokens verified equal")
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", type=Path, metavar="PATH", help="JSON lines (default: corpora of the standard library)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="tokenizer folder (default: one trained on the input)")
    parser.add_argument("--vocab-size", type=int, default=4096, metavar="N", help="of that tokenizer (default: 4096)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes on each side (default: 2)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="pairs of runs (default: 5)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
