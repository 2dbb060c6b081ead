"""The split by document hash, the endless order of a corpus, and cutting at the sequence length."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.data.corpus import Corpus, Piece, cut
from megatron_ext.data.options import SourceOptions
from megatron_ext.errors import DataError
from tests.train.tiny_run import random_documents, write_corpus


def opened(prefix: str, held_out: float = 0.0, name: str = "tiny") -> Corpus:
    return Corpus(SourceOptions(name, prefix), held_out)


def sides(corpus: Corpus) -> tuple[set[int], set[int]]:
    """Documents that one epoch of training and of validation yields."""
    picked = []
    for held_out in (False, True):
        epoch = []
        for position, document in corpus.shuffled("seed", 0, held_out):
            if position >= len(corpus):
                break
            epoch.append(document)
        assert len(epoch) == len(set(epoch))
        picked.append(set(epoch))
    return picked[0], picked[1]


def test_split_is_disjoint_and_together_everything(tmp_path: Path) -> None:
    documents = random_documents(400, 30)
    documents[17] = documents[17][:0]
    corpus = opened(write_corpus(tmp_path / "tiny", documents), held_out=0.2)
    train, validation = sides(corpus)
    assert not train & validation
    assert train | validation == set(range(400)) - {17}
    assert 400 * 0.2 * 0.6 < len(validation) < 400 * 0.2 * 1.4


def test_split_is_that_of_the_contents_in_any_order_and_dtype(tmp_path: Path) -> None:
    documents = random_documents(200, 400, seed=4)
    order = np.random.default_rng(0).permutation(200)
    first = opened(write_corpus(tmp_path / "first", documents), held_out=0.3)
    second = opened(write_corpus(tmp_path / "second", [documents[i] for i in order], dtype="int32"), held_out=0.3, name="copy")
    assert [second.is_held_out(place) for place in range(200)] == [first.is_held_out(int(i)) for i in order]


def test_a_larger_share_holds_out_the_same_documents_and_more(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "tiny", random_documents(200, 30))
    none, small, large = (opened(prefix, held_out) for held_out in (0.0, 0.1, 0.5))
    held = [{d for d in range(200) if corpus.is_held_out(d)} for corpus in (none, small, large)]
    assert held[0] == set() and held[1] < held[2]


def test_epochs_have_orders_of_their_own_and_start_anywhere(tmp_path: Path) -> None:
    corpus = opened(write_corpus(tmp_path / "tiny", random_documents(50, 30)))
    two = list(islice(corpus.shuffled("7", 0), 100))
    assert [position for position, _ in two] == list(range(100))
    first, second = ([document for _, document in part] for part in (two[:50], two[50:]))
    assert sorted(first) == sorted(second) == list(range(50)) and first != second
    assert list(islice(corpus.shuffled("7", 63), 37)) == two[63:]
    assert list(islice(corpus.shuffled("8", 0), 50)) != two[:50]


@pytest.mark.parametrize(("held_out", "side", "word"), [(0.0, True, "validation"), (0.999999, False, "training")])
def test_an_empty_side_is_refused(tmp_path: Path, held_out: float, side: bool, word: str) -> None:
    corpus = opened(write_corpus(tmp_path / "tiny", random_documents(10, 30)), held_out)
    with pytest.raises(DataError, match=f"none of 10 documents is left for {word} "):
        next(corpus.shuffled("seed", 0, side))


def test_a_corpus_without_tokens_is_refused(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "tiny", [np.zeros(0, dtype=np.uint16)])
    with pytest.raises(DataError, match=r"tiny\.bin has no tokens \(source 'tiny'\)"):
        opened(prefix)


@given(length=st.integers(0, 100), sequence=st.integers(1, 40), start=st.integers(0, 100))
def test_pieces_tile_the_document_and_lose_one_label(length: int, sequence: int, start: int) -> None:
    pieces = list(cut(2, 5, length, sequence, start))
    assert [t for piece in pieces for t in range(piece.start, piece.stop)] == list(range(start, length))
    assert all(0 < len(piece) <= sequence and (piece.source, piece.document) == (2, 5) for piece in pieces)
    assert sum(piece.loss_tokens for piece in pieces) == max(0, length - start - 1)
    assert len(pieces) == -(-max(0, length - start) // sequence)


def test_a_piece_says_whether_its_last_token_has_a_label() -> None:
    assert list(cut(0, 0, 5, 2)) == [Piece(0, 0, 0, 2, True), Piece(0, 0, 2, 4, True), Piece(0, 0, 4, 5, False)]
    assert [piece.loss_tokens for piece in cut(0, 0, 5, 2)] == [2, 2, 0]
