"""Metadata before documents: read, counted and never predicted; given up in a later stage; written beside the documents."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.data.batch import read_pack
from megatron_ext.data.corpus import Corpus, Piece, cut
from megatron_ext.data.indexed import IndexedDataset
from megatron_ext.data.loss_weights import source_weights, total_weight
from megatron_ext.data.metadata import MetadataTemplate
from megatron_ext.data.mixture import Mixture
from megatron_ext.data.options import DataOptions, SourceOptions
from megatron_ext.data.preprocess import preprocess
from megatron_ext.data.shares import ConstantShares
from megatron_ext.data.stages import Stage
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.data.tokenizer_training import train_tokenizer
from megatron_ext.data.validation import validation_sets
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.planning import Pack, Slice
from tests.train.tiny_run import VOCAB, random_documents, write_corpus

SEQUENCE = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """30 documents of 1 to 50 tokens, whose metadata have 0 to 6."""
    folder = tmp_path_factory.mktemp("metadata")
    return Corpus(described("described", folder, longest=7))


def described(name: str, folder: Path, longest: int) -> SourceOptions:
    documents, rows = random_documents(30, 50, seed=1), [row[:-1] for row in random_documents(30, longest, seed=2)]
    return SourceOptions(name, write_corpus(folder / name, documents), metadata=write_corpus(folder / f"{name}_metadata", rows))


def row(corpus: Corpus, document: int) -> list[int]:
    assert corpus.metadata is not None
    return corpus.metadata.tokens(document).tolist()


def epoch_of(corpus: Corpus, metadata: bool = True, sequence: int = SEQUENCE) -> list[Piece]:
    pieces = []
    for position, piece in corpus.pieces(0, 0, sequence, 0, 0, metadata):
        if position >= len(corpus):
            break
        pieces.append(piece)
    return pieces


@given(length=st.integers(1, 100), sequence=st.integers(2, 40), data=st.data())
def test_the_first_piece_has_the_prefix_and_every_token_of_the_document_is_predicted(
    length: int, sequence: int, data: st.DataObject
) -> None:
    prefix = data.draw(st.integers(0, sequence - 1))
    pieces = list(cut(0, 0, length, sequence, prefix=prefix))
    assert [t for piece in pieces for t in range(piece.start, piece.stop)] == list(range(length))
    assert [piece.prefix for piece in pieces] == [prefix] + [0] * (len(pieces) - 1)
    assert all(len(piece) <= sequence for piece in pieces)
    assert sum(map(len, pieces)) == prefix + length
    assert sum(piece.loss_tokens for piece in pieces) == (length if prefix else length - 1)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_each_field_by_its_definition(corpus: Corpus, data: st.DataObject) -> None:
    """Of slices that plans make: whole pieces and parts that begin or end in metadata."""
    pieces = epoch_of(corpus)
    number = data.draw(st.integers(0, len(pieces) - 1))
    piece = pieces[number]
    begin = data.draw(st.integers(0, len(piece) - 1))
    end = data.draw(st.integers(begin + 1, len(piece)))
    batch = read_pack(Pack(0, 1, (Slice(number, begin, end),)), pieces, [corpus], VOCAB)
    before = row(corpus, piece.document) if piece.prefix else []
    assert len(before) == piece.prefix
    whole = before + corpus.tokens(piece.document, piece.start, piece.stop + piece.has_next).tolist()
    assert batch.tokens.tolist() == whole[begin:end] and batch.positions.tolist() == list(range(begin, end))
    for place, at in enumerate(range(begin, end)):
        is_predicted = at + 1 < len(whole) and at + 1 >= piece.prefix
        assert float(batch.loss_weight[place]) == is_predicted
        if at + 1 < len(whole):
            assert int(batch.labels[place]) == whole[at + 1]


def test_documents_are_predicted_once_and_metadata_never(corpus: Corpus) -> None:
    pieces = epoch_of(corpus)
    batch = read_pack(Pack(0, 1, tuple(Slice(i, 0, len(piece)) for i, piece in enumerate(pieces))), pieces, [corpus], VOCAB)
    predicted = sorted(batch.labels[batch.loss_weight > 0].tolist())
    documents = [corpus.tokens(d, 0, corpus.length(d)).tolist() for d in range(len(corpus))]
    assert predicted == sorted(token for d, tokens in enumerate(documents) for token in tokens[0 if row(corpus, d) else 1 :])
    assert len(predicted) == sum(piece.loss_tokens for piece in pieces)
    assert len(batch.tokens) == corpus.num_tokens + sum(len(row(corpus, d)) for d in range(len(corpus))), "all of it is read"


@torch.no_grad()
def test_the_loss_is_that_of_the_document_given_its_metadata(corpus: Corpus) -> None:
    model = GPT(ModelConfig(VOCAB, 16, 24, 2, 4, 2, 4, 64, init_std=0.3), "dense")
    model.reset_parameters(1)
    model = model.double()
    pieces = epoch_of(corpus, sequence=64)
    for number in [number for number, piece in enumerate(pieces) if piece.prefix > 1][:4]:
        piece = pieces[number]
        batch = read_pack(Pack(0, 1, (Slice(number, 0, len(piece)),)), pieces, [corpus], VOCAB)
        masked = float(model(*batch.model_inputs)[0])
        everything = list(batch.model_inputs)
        everything[-1] = torch.ones_like(batch.loss_weight)
        losses = model(*everything)[1]
        assert masked == pytest.approx(float(losses[piece.prefix - 1 : len(piece) - 1].sum()), rel=1e-12)
        assert abs(masked - float(losses[:-1].sum())) > 1.0, "the control: with its metadata predicted the loss is another"
        changed = [batch.tokens.clone(), *batch.model_inputs[1:]]
        changed[0][0] = (changed[0][0] + 1) % VOCAB
        assert float(model(*changed)[0]) != masked, "metadata are read"


def test_weights_of_tokens_are_those_of_the_document_behind_its_metadata(corpus: Corpus, tmp_path: Path) -> None:
    np.save(tmp_path / "weights.npy", np.arange(1, corpus.dataset.num_tokens + 1, dtype=np.float32))
    weighted = Corpus(replace(corpus.options, token_weights=str(tmp_path / "weights.npy")))
    weights, pieces = source_weights([weighted]), [piece for piece in epoch_of(weighted) if len(piece)]
    pack = Pack(0, 1, tuple(Slice(number, 0, len(piece)) for number, piece in enumerate(pieces)))
    found = read_pack(pack, pieces, [weighted], VOCAB, weights=weights).loss_weight.tolist()
    starts = np.cumsum(weighted.dataset.lengths) - weighted.dataset.lengths
    predicted = [number for number in found if number]
    expected = [
        starts[piece.document] + token + 1
        for piece in pieces
        for token in range(piece.start + (piece.prefix == 0), piece.stop + piece.has_next)
    ]
    assert predicted == expected and any(piece.prefix > 1 for piece in pieces)
    assert total_weight(pieces, weights) == sum(expected)
    halves = [read_pack(Pack(0, 2, pack.slices), pieces, [weighted], VOCAB, place, weights).loss_weight.tolist() for place in (0, 1)]
    assert sum(map(sum, halves)) == sum(expected)


def staged(corpus: Corpus) -> Mixture:
    return Mixture([corpus], [1.0], 0, SEQUENCE, later=[Stage(700, 2 * SEQUENCE, ConstantShares.of([1]), metadata=False)])


def test_cool_down_leaves_metadata_out_and_loses_no_token(corpus: Corpus) -> None:
    mixture, stages, taken = staged(corpus), [], list[Piece]()
    for _ in range(40):
        pieces = mixture.take(50)
        taken += pieces
        stages.append(mixture.stage.metadata)
        assert mixture.stage.metadata or all(piece.prefix == 0 for piece in pieces)
    assert stages == sorted(stages, reverse=True) and len(set(stages)) == 2
    assert any(piece.prefix for piece in taken)
    for first, second in pairwise(taken):
        assert (second.start == first.stop and second.document == first.document) if first.has_next else second.start == 0
    without = [document for document in dict.fromkeys(p.document for p in epoch_of(corpus, metadata=False))]
    assert list(dict.fromkeys(piece.document for piece in taken))[: len(without)] == without


def test_resuming_around_the_cool_down(corpus: Corpus) -> None:
    mixture = staged(corpus)
    history = [(json.dumps(mixture.state_dict()), mixture.take(50)) for _ in range(40)]
    for step in range(0, 30, 3):
        again = staged(corpus)
        again.load_state_dict(json.loads(history[step][0]))
        assert [again.take(50) for _ in range(10)] == [pieces for _, pieces in history[step : step + 10]]


def test_metadata_are_part_of_the_fingerprint(corpus: Corpus) -> None:
    plain = Corpus(SourceOptions(corpus.name, corpus.path))
    prints = {
        Mixture([plain], [1.0], 0, SEQUENCE).fingerprint(),
        Mixture([corpus], [1.0], 0, SEQUENCE).fingerprint(),
        Mixture([corpus], [1.0], 0, SEQUENCE, metadata=False).fingerprint(),
        staged(corpus).fingerprint(),
    }
    assert len(prints) == 4


def test_validation_is_without_metadata(corpus: Corpus) -> None:
    with pytest.raises(ConfigError, match=r"validation\.0\.metadata: .*; accepted: nothing"):
        DataOptions([corpus.options], SEQUENCE, 64, validation=[replace(corpus.options, name="held")])
    options = DataOptions([corpus.options], SEQUENCE, 64, validation_fraction=0.5)
    [held] = validation_sets(options, [Corpus(corpus.options, 0.5)], 1000)
    assert held.pieces and all(piece.prefix == 0 for piece in held.pieces)


def test_metadata_that_do_not_fit_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    rows = write_corpus(tmp_path / "rows", random_documents(29, 5))
    with pytest.raises(DataError, match=r"rows\.idx has 29 rows of metadata; accepted: 30, one for each document of .* \(source 'c'\)"):
        Corpus(SourceOptions("c", corpus.path, metadata=rows))
    long = [np.array([1], np.uint16)] * 30
    long[4] = np.ones(SEQUENCE, np.uint16)
    described = Corpus(SourceOptions("c", corpus.path, metadata=write_corpus(tmp_path / "long", long)))
    with pytest.raises(DataError, match=r"long\.bin: document 4 of source 'c' has 16 tokens of metadata; accepted: fewer than .* \(16\)"):
        Mixture([described], [1.0], 0, SEQUENCE)
    with pytest.raises(DataError, match=r"accepted: fewer than data\.sequence_length \(4\)"):
        Mixture([described], [1.0], 0, 32, later=[Stage(100, 4, ConstantShares.of([1]))])
    assert Mixture([described], [1.0], 0, SEQUENCE, metadata=False).take(64)
    assert Mixture([described], [1.0], 0, SEQUENCE + 1).take(64)


def test_a_token_outside_the_vocabulary_names_the_metadata(corpus: Corpus, tmp_path: Path) -> None:
    rows = write_corpus(tmp_path / "rows", [np.array([VOCAB], np.uint16)] * 30)
    wrong = Corpus(SourceOptions("c", corpus.path, metadata=rows))
    pieces = epoch_of(wrong)
    with pytest.raises(DataError, match=rf"rows\.bin, document {pieces[0].document}: token {VOCAB} is outside"):
        read_pack(Pack(0, 1, (Slice(0, 0, 2),)), pieces, [wrong], VOCAB)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["URL: a.org b.com text and more text"], 300, folder)
    return load_tokenizer(folder)


RECORDS = [
    {"text": "first text", "url": "a.org", "year": "1999"},
    {"text": " ", "url": "dropped.org", "year": "2000"},
    {"text": "second", "url": "", "year": "2001"},
    {"text": "third", "url": "b.com", "year": "2002"},
]


def rows_of(prefix: Path, tokenizer: Tokenizer) -> list[str]:
    rows = IndexedDataset(prefix)
    return [tokenizer.decode(rows.tokens(number)) for number in range(len(rows))]


@pytest.mark.parametrize("workers", [1, 2])
def test_preprocessing_writes_a_row_for_each_document(tmp_path: Path, tokenizer: Tokenizer, workers: int) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), "utf-8")
    preprocess([path], tokenizer, tmp_path / "out", metadata="URL: {url} ({year})\n\n", workers=workers)
    expected = ["URL: a.org (1999)\n\n", "", "URL: b.com (2002)\n\n"]
    rows = IndexedDataset(tmp_path / "out_text_metadata")
    assert [rows.tokens(number).tolist() for number in range(3)] == [tokens.tolist() for tokens in tokenizer.encode_batch(expected)]
    assert len(rows) == len(IndexedDataset(tmp_path / "out_text_document")) == 3
    options = SourceOptions("c", str(tmp_path / "out_text_document"), metadata=str(tmp_path / "out_text_metadata"))
    assert sum(piece.prefix for piece in epoch_of(Corpus(options), sequence=512)) == rows.num_tokens > 0


def test_a_record_without_the_field_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"text": "no url"}) + "\n", "utf-8")
    with pytest.raises(DataError, match=r"in\.jsonl, line 1: no key 'url'"):
        preprocess([path], tokenizer, tmp_path / "out", metadata="URL: {url}")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("text", ["", "URL", "{}", "{0.a}", "{url!r}", "{url:>5}", "{url", "{a[0]}"])
def test_templates_that_cannot_be_filled(text: str) -> None:
    with pytest.raises(DataError, match="accepted: text with"):
        MetadataTemplate(text)


def test_a_template_with_braces_and_a_field_twice() -> None:
    template = MetadataTemplate("{{{a}}} {b} {a}")
    assert template.fields == ("a", "b") and template.fill(["x", "y"]) == "{x} y x" and template.fill(["x", " "]) == ""
