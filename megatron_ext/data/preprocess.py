"""Documents to tokens: read, tokenize in parallel, write .bin/.idx."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from megatron_ext.data.blocks import Fault
from megatron_ext.data.encode import BlockEncoder, EncodedBlock
from megatron_ext.data.indexed_writer import IndexedDatasetWriter
from megatron_ext.data.metadata import MetadataTemplate
from megatron_ext.data.readers import find_sources, read_blocks, source_size
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.data.worker_pool import ordered_map
from megatron_ext.errors import DataError

ON_ERROR = ("fail", "skip")


@dataclass
class KeySummary:
    """What was written of one key."""

    prefix: str
    """Of the .bin/.idx pair."""
    documents: int = 0
    tokens: int = 0
    """With the end-of-document tokens."""
    num_bytes: int = 0
    """UTF-8 bytes of the documents."""
    empty: int = 0
    """Documents that were dropped for having no text."""


@dataclass
class Summary:
    """Progress of a preprocessing run, and its result at the end."""

    total_bytes: int
    """Size of the input files."""
    keys: dict[str, KeySummary]
    done_bytes: int = 0
    skipped: int = 0
    """Records that could not be read."""
    started: float = field(default_factory=time.monotonic)

    @property
    def documents(self) -> int:
        """Documents written, over all keys."""
        return sum(key.documents for key in self.keys.values())

    @property
    def tokens(self) -> int:
        """Tokens written, over all keys."""
        return sum(key.tokens for key in self.keys.values())

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started


def preprocess(
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer,
    output: str | Path,
    *,
    keys: Sequence[str] = ("text",),
    workers: int = 1,
    on_error: str = "fail",
    append_eod: bool = True,
    metadata: str | None = None,
    progress: Callable[[Summary], None] = lambda summary: None,
) -> Summary:
    """Tokenize documents into ``OUTPUT_KEY_document.bin`` and ``.idx``, as Megatron names them.

    The files are the same for any number of workers. They appear when everything is done; a run that was killed leaves only ``*.partial``
    files, which the next run overwrites.

    Args:
        inputs: see ``read_documents``.
        output: prefix of the files to write; its folder is made if missing.
        keys: fields of a record, each of which becomes a set of its own.
        workers: processes that tokenize.
        on_error: "fail" stops at the first record that cannot be read; "skip" counts it, and lists it in ``OUTPUT.skipped.jsonl``.
        append_eod: end each document with the end-of-document token.
        metadata: template of a row of tokens for each document, with names of fields in braces, such as ``"URL: {url}\\n\\n"``; written
            into ``OUTPUT_KEY_metadata.bin`` and ``.idx``. The row is empty where a field is blank.
        progress: called after every block.

    Raises:
        DataError: an unusable argument or input, or no document in all of it.
    """
    if workers < 1 or on_error not in ON_ERROR or not keys or len(set(keys)) != len(keys):
        raise DataError(
            f"workers={workers}, on_error={on_error!r}, keys={list(keys)}: expected workers >= 1, "
            f"on_error one of {', '.join(ON_ERROR)}, and different keys"
        )
    sources = find_sources(inputs)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    summary = Summary(
        total_bytes=sum(map(source_size, sources)),
        keys={key: KeySummary(f"{output}_{key}_document") for key in keys},
    )
    encoder = BlockEncoder(tokenizer, tuple(keys), append_eod, None if metadata is None else MetadataTemplate(metadata))
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedDatasetWriter(key.prefix, tokenizer.dtype)) for key in summary.keys.values()]
        rows = [stack.enter_context(IndexedDatasetWriter(f"{output}_{key}_metadata", tokenizer.dtype)) for key in keys if metadata]
        report = stack.enter_context(_skipped_report(Path(f"{output}.skipped.jsonl"))) if on_error == "skip" else None
        for block in ordered_map(encoder, read_blocks(sources, encoder.fields), workers):
            _handle_faults(block.faults, report)
            _write(block, writers, summary)
            for texts, writer in zip(block.texts, rows, strict=metadata is not None):
                writer.add_many(*texts.metadata)
            progress(summary)
        if not summary.documents:
            raise DataError(f"{', '.join(map(str, inputs))}: no document with text in {len(sources)} files ({summary.skipped} unreadable)")
    return summary


def _write(block: EncodedBlock, writers: Sequence[IndexedDatasetWriter], summary: Summary) -> None:
    for texts, writer, key in zip(block.texts, writers, summary.keys.values(), strict=True):
        writer.add_many(texts.tokens, texts.lengths)
        key.documents += len(texts.lengths)
        key.tokens += len(texts.tokens)
        key.num_bytes += texts.num_bytes
        key.empty += texts.empty
    summary.done_bytes += block.size
    summary.skipped += len(block.faults)


def _handle_faults(faults: Sequence[Fault], report: IO[str] | None) -> None:
    for fault in faults:
        if report is None:
            raise DataError(str(fault))
        report.write(json.dumps({"path": fault.path, "place": fault.place, "reason": fault.reason}, ensure_ascii=True) + "\n")


@contextmanager
def _skipped_report(path: Path) -> Iterator[IO[str]]:
    """A file of a line for each record that was skipped; it may stay empty."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
