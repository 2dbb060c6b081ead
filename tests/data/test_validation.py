import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data.corpus import Corpus
from megatron_ext.data.options import DataOptions, SourceOptions
from megatron_ext.data.validation import ValidationSet, validation_sets
from megatron_ext.errors import DataError
from tests.train.tiny_run import random_documents, write_corpus


def sets_of(folder: Path, most_tokens: int = 200, held_out: float = 0.3) -> list[ValidationSet]:
    train = SourceOptions("train", write_corpus(folder / "train", random_documents(60, 40, seed=1)))
    own = SourceOptions("own", write_corpus(folder / "own", random_documents(60, 40, seed=2)))
    data = DataOptions([train], 16, 64, validation=[own], validation_fraction=held_out)
    return validation_sets(data, [Corpus(train, held_out)], most_tokens)


def test_own_corpora_and_held_out_sides(tmp_path: Path) -> None:
    own, held_out = sets_of(tmp_path)
    assert [(each.name, each.split) for each in (own, held_out)] == [("own", "validation"), ("train", "held_out")]
    assert all(held_out.corpus.is_held_out(piece.document) for piece in held_out.pieces)
    assert all(piece.loss_tokens > 0 and len(piece) <= 16 for each in (own, held_out) for piece in each.pieces)
    assert {piece.source for each in (own, held_out) for piece in each.pieces} == {0}
    assert [each.name for each in sets_of(tmp_path / "none", held_out=0.0)] == ["own"] if (tmp_path / "none").mkdir() is None else False


def test_the_choice_is_always_the_same_and_about_as_large_as_asked(tmp_path: Path) -> None:
    first, again = sets_of(tmp_path), sets_of(tmp_path)
    assert [each.pieces for each in first] == [each.pieces for each in again]
    assert all(200 <= sum(map(len, each.pieces)) < 200 + 16 for each in first)
    everything = sets_of(tmp_path, most_tokens=10**6)[0]
    assert {piece.document for piece in everything.pieces} == {d for d in range(60) if everything.corpus.length(d) > 1}
    assert len({(piece.document, piece.start) for piece in everything.pieces}) == len(everything.pieces), "no document twice"


def test_unigram_entropy_is_that_of_the_labels(tmp_path: Path) -> None:
    for each in sets_of(tmp_path):
        labels = Counter[int]()
        for piece in each.pieces:
            labels.update(each.corpus.dataset.tokens(piece.document)[piece.start + 1 : piece.stop + piece.has_next].tolist())
        total = sum(labels.values())
        assert each.unigram_entropy() == pytest.approx(-sum(n / total * math.log(n / total) for n in labels.values()), rel=1e-12)


def test_entropy_of_a_uniform_choice_is_the_logarithm(tmp_path: Path) -> None:
    source = SourceOptions("even", write_corpus(tmp_path / "even", [np.array([9, *range(8)], dtype=np.uint16)]))
    (even,) = validation_sets(DataOptions([source], 16, 64, validation=[source]), [], 100)
    assert even.unigram_entropy() == pytest.approx(math.log(8), rel=1e-12)


def test_a_corpus_without_a_document_for_validation_is_refused(tmp_path: Path) -> None:
    source = SourceOptions("one", write_corpus(tmp_path / "one", [np.arange(30, dtype=np.uint16)]))
    with pytest.raises(DataError, match="none of 1 documents is left for validation"):
        validation_sets(DataOptions([source], 16, 64, validation_fraction=1e-9), [Corpus(source, 1e-9)], 100)


def test_a_corpus_in_which_nothing_has_a_label_is_refused(tmp_path: Path) -> None:
    source = SourceOptions("single", write_corpus(tmp_path / "single", [np.array([3], dtype=np.uint16)] * 5))
    with pytest.raises(DataError, match=r"single\.bin has no document of at least two tokens"):
        validation_sets(DataOptions([source], 16, 64, validation=[source]), [], 100)
