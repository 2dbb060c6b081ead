"""Corpora, what they are made from, and what goes with them."""

import gzip
import json
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_ext.data.corpus import Corpus
from megatron_ext.data.indexed import IndexedDataset
from megatron_ext.data.indexed_writer import IndexedDatasetWriter
from megatron_ext.data.loss_weights import WeightFiles
from megatron_ext.data.options import SourceOptions
from megatron_ext.data.preprocess import preprocess
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.byte_level import LLAMA_3, byte_level_backend, split_then_bytes
from tests.fuzz.mutations import Mutator, mutate_bytes, mutate_json, mutate_json_lines
from tests.fuzz.target import Target

TEXTS = ("It was a dark night.", "def f(x):\n    return x", "Grüße, 世界!", "a", "one two three " * 20)


def _write_pair(folder: Path) -> None:
    with IndexedDatasetWriter(folder / "pair", np.dtype("uint16")) as writer:
        for length in (5, 1, 9, 3, 30):
            writer.add(np.arange(length, dtype=np.uint16))


def _load_pair(folder: Path, random: Random) -> None:
    dataset = IndexedDataset(folder / "pair")
    assert int(dataset.lengths.sum()) == dataset.num_tokens
    for document in range(min(len(dataset), 50)):
        assert len(dataset.tokens(document)) == dataset.lengths[document]
    corpus = Corpus(SourceOptions("a", str(folder / "pair")), held_out=0.2)
    documents = corpus.shuffled("1", 0)
    for _, (_, document) in zip(range(5), documents, strict=False):
        assert corpus.length(document) > 0


PAIR_TARGET = Target(_write_pair, {"pair.bin": mutate_bytes, "pair.idx": mutate_bytes}, _load_pair)


def tokenizer() -> Tokenizer:
    """Of five hundred tokens, made of the texts."""
    return Tokenizer(byte_level_backend(split_then_bytes(LLAMA_3), TEXTS).to_str(), eod_id=0, name="tiny")


def _corpus_target(name: str, content: bytes, mutate: Mutator) -> Target:
    tiny = tokenizer()

    def make(folder: Path) -> None:
        (folder / name).write_bytes(content)

    def load(folder: Path, random: Random) -> None:
        output = folder / "out" / "tokens"
        on_error = random.choice(("fail", "skip"))
        summary = preprocess([folder / name], tiny, output, workers=1, on_error=on_error)
        dataset = IndexedDataset(f"{output}_text_document")
        assert (len(dataset), dataset.num_tokens) == (summary.documents, summary.tokens)
        assert summary.done_bytes == summary.total_bytes

    return Target(make, {name: mutate}, load)


def json_lines() -> bytes:
    """A file of all texts."""
    return "".join(json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(TEXTS)).encode()


def parquet() -> bytes:
    """The same as a table."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": list(TEXTS) * 3, "id": list(range(15))}), sink, row_group_size=5, compression="zstd")
    return sink.getvalue().to_pybytes()


JSON_LINES_TARGET = _corpus_target("corpus.jsonl", json_lines(), mutate_json_lines)
GZIP_TARGET = _corpus_target("corpus.jsonl.gz", gzip.compress(json_lines()), mutate_bytes)
PARQUET_TARGET = _corpus_target("corpus.parquet", parquet(), mutate_bytes)
TEXT_TARGET = _corpus_target("corpus.txt", "\n".join(TEXTS).encode(), mutate_bytes)


def _make_scores(folder: Path) -> None:
    _write_pair(folder)
    np.save(folder / "scores.npy", np.linspace(0, 1, 5, dtype=np.float32))
    np.save(folder / "documents.npy", np.ones(5, dtype=np.float32))
    np.save(folder / "tokens.npy", np.ones(48, dtype=np.float32))


def _load_scores(folder: Path, random: Random) -> None:
    files = {"scores": folder / "scores.npy", "document_weights": folder / "documents.npy", "token_weights": folder / "tokens.npy"}
    options = SourceOptions("a", str(folder / "pair"), order="descending", **{key: str(path) for key, path in files.items()})
    corpus = Corpus(options)
    assert len(list(zip(range(5), corpus.pieces(0, 1, 8, 0, 0), strict=False))) == 5
    weights = WeightFiles(corpus).of(2, slice(0, 4))
    assert np.isfinite(weights).all()
    corpus.fingerprint()


SCORES_TARGET = Target(_make_scores, dict.fromkeys(("scores.npy", "documents.npy", "tokens.npy"), mutate_bytes), _load_scores)


def _make_tokenizer(folder: Path) -> None:
    backend = byte_level_backend(split_then_bytes(LLAMA_3), TEXTS)
    (folder / "tokenizer.json").write_text(backend.to_str(), "utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "model_max_length": 100}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")


def _load_tokenizer(folder: Path, random: Random) -> None:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(TEXTS[0])
    assert ids.size == 0 or int(ids.max()) < tokenizer.vocab_size
    tokenizer.decode(ids)


TOKENIZER_TARGET = Target(_make_tokenizer, {"tokenizer.json": mutate_json, "tokenizer_config.json": mutate_json}, _load_tokenizer)
