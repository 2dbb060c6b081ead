"""Packs as tensors: labels inside documents, positions that restart, and documents that do not see each other."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.data.batch import PackedBatch, read_pack
from megatron_ext.data.corpus import Corpus, Piece, cut
from megatron_ext.data.options import SourceOptions
from megatron_ext.errors import DataError
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.planning import CostModel, Pack, Slice, plan_step
from tests.train.tiny_run import VOCAB, random_documents, write_corpus

SEQUENCE = 16


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    folder = tmp_path_factory.mktemp("batch")
    sizes = {"a": 20, "b": 6}
    return [Corpus(SourceOptions(name, write_corpus(folder / name, random_documents(n, 50, seed=n)))) for name, n in sizes.items()]


def pieces_of(corpora: list[Corpus]) -> list[Piece]:
    return [piece for s, corpus in enumerate(corpora) for d in range(len(corpus)) for piece in cut(s, d, corpus.length(d), SEQUENCE)]


def pack_of(pieces: list[Piece], *chosen: int) -> Pack:
    return Pack(0, 1, tuple(Slice(number, 0, len(pieces[number])) for number in chosen))


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_each_field_by_its_definition(corpora: list[Corpus], data: st.DataObject) -> None:
    pieces = pieces_of(corpora)
    chosen = data.draw(st.lists(st.integers(0, len(pieces) - 1), min_size=1, max_size=6, unique=True))
    batch = read_pack(pack_of(pieces, *chosen), pieces, corpora, VOCAB)
    assert batch.cu_seqlens.tolist() == np.cumsum([0] + [len(pieces[i]) for i in chosen]).tolist()
    assert batch.max_seqlen == max(len(pieces[i]) for i in chosen)
    for begin, number in zip(batch.cu_seqlens.tolist(), chosen, strict=False):
        piece = pieces[number]
        document = corpora[piece.source].dataset.tokens(piece.document).tolist()
        for offset in range(len(piece)):
            at, place = begin + offset, piece.start + offset
            assert (int(batch.tokens[at]), int(batch.positions[at]), int(batch.sources[at])) == (document[place], offset, piece.source)
            expected = (document[place + 1], 1.0) if place + 1 < len(document) else (0, 0.0)
            assert (int(batch.labels[at]), float(batch.loss_weight[at])) == expected


def test_dtypes_are_as_documented(corpora: list[Corpus]) -> None:
    pieces = pieces_of(corpora)
    batch = read_pack(pack_of(pieces, 0, 1), pieces, corpora, VOCAB)
    assert (batch.tokens.dtype, batch.labels.dtype, batch.sources.dtype) == (torch.int64,) * 3
    assert (batch.positions.dtype, batch.cu_seqlens.dtype, batch.loss_weight.dtype) == (torch.int32, torch.int32, torch.float32)
    moved = batch.to(torch.device("meta"))
    assert {getattr(moved, name).device.type for name in ("tokens", "labels", "positions", "cu_seqlens", "loss_weight", "sources")} == {
        "meta"
    }
    assert moved.max_seqlen == batch.max_seqlen


def test_cutting_loses_no_label(corpora: list[Corpus]) -> None:
    """Over a whole epoch every token but the first of each document is a label once, in documents cut anywhere."""
    pieces = pieces_of(corpora)
    plan = plan_step([len(piece) for piece in pieces], 1, CostModel(40))
    batches = [read_pack(pack, pieces, corpora, VOCAB) for pack in plan.packs]
    labelled = sum(int(batch.loss_weight.sum()) for batch in batches)
    assert labelled == sum(max(0, corpus.length(d) - 1) for corpus in corpora for d in range(len(corpus)))
    assert labelled == sum(piece.loss_tokens for piece in pieces)
    seen = sorted(label for batch in batches for label in batch.labels[batch.loss_weight > 0].tolist())
    assert seen == sorted(t for corpus in corpora for d in range(len(corpus)) for t in corpus.dataset.tokens(d)[1:].tolist())


def test_a_slice_inside_a_piece_continues_positions_and_labels(corpora: list[Corpus]) -> None:
    """A policy may give parts of one piece to several packs."""
    pieces = pieces_of(corpora)
    number = next(i for i, piece in enumerate(pieces) if len(piece) == SEQUENCE and piece.start > 0)
    batch = read_pack(Pack(0, 1, (Slice(number, 3, 7),)), pieces, corpora, VOCAB)
    document = corpora[pieces[number].source].dataset.tokens(pieces[number].document).astype(int).tolist()
    begin = pieces[number].start + 3
    assert batch.tokens.tolist() == document[begin : begin + 4] and batch.labels.tolist() == document[begin + 1 : begin + 5]
    assert batch.positions.tolist() == [3, 4, 5, 6] and batch.loss_weight.tolist() == [1.0] * 4


def token_losses(batch: PackedBatch, backend: str) -> torch.Tensor:
    config = ModelConfig(VOCAB, 16, 24, 2, 4, 2, 4, 64, init_std=0.3)
    model = GPT(config, backend)
    model.reset_parameters(1)
    return model.double()(*batch.model_inputs)[1].detach()


@pytest.mark.parametrize("backend", ["dense", "sdpa"])
def test_one_token_changes_no_other_document(corpora: list[Corpus], backend: str) -> None:
    pieces = pieces_of(corpora)
    batch = read_pack(pack_of(pieces, 0, 3, 5, 8), pieces, corpora, VOCAB)
    before = token_losses(batch, backend)
    for document in range(4):
        begin, end = batch.cu_seqlens[document : document + 2].tolist()
        tokens = batch.tokens.clone()
        tokens[begin] = (tokens[begin] + 1) % VOCAB
        after = token_losses(replace(batch, tokens=tokens), backend)
        outside = torch.ones(len(before), dtype=torch.bool)
        outside[begin:end] = False
        assert torch.equal(after[outside], before[outside])
        assert not torch.equal(after[begin:end], before[begin:end]), "the control: inside the document the loss changes"


def test_isolation_needs_the_borders(corpora: list[Corpus]) -> None:
    """The control: with one border for the whole pack, the same comparison fails."""
    pieces = pieces_of(corpora)
    batch = read_pack(pack_of(pieces, 3, 5), pieces, corpora, VOCAB)
    total = len(batch.tokens)
    batch = replace(batch, cu_seqlens=torch.tensor([0, total], dtype=torch.int32), max_seqlen=total)
    tokens = batch.tokens.clone()
    tokens[0] = (tokens[0] + 1) % VOCAB
    border = len(pieces[3])
    assert not torch.equal(token_losses(replace(batch, tokens=tokens), "sdpa")[border:], token_losses(batch, "sdpa")[border:])


@pytest.mark.parametrize(("dtype", "token"), [("uint16", VOCAB), ("uint16", 65535), ("int32", -1)])
def test_a_token_outside_the_vocabulary_names_file_and_document(tmp_path: Path, dtype: str, token: int) -> None:
    documents = [np.array([1, 2, 3]), np.array([4, token, 5])]
    corpus = Corpus(SourceOptions("bad", write_corpus(tmp_path / "bad", documents, dtype)))
    pieces = pieces_of([corpus])
    read_pack(pack_of(pieces, 0), pieces, [corpus], VOCAB)
    with pytest.raises(DataError, match=rf"bad\.bin, document 1: token {token} is outside the model's vocabulary of {VOCAB}"):
        read_pack(pack_of(pieces, 0, 1), pieces, [corpus], VOCAB)


def test_a_label_outside_the_vocabulary_is_noticed_where_the_piece_ends(tmp_path: Path) -> None:
    corpus = Corpus(SourceOptions("bad", write_corpus(tmp_path / "bad", [np.array([1] * SEQUENCE + [VOCAB])])))
    pieces = pieces_of([corpus])
    with pytest.raises(DataError, match="document 0: token 64"):
        read_pack(pack_of(pieces, 0), pieces, [corpus], VOCAB)
