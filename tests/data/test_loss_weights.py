"""Weights of losses from files: which token gets which, what is refused, and that packs carry them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ext.data.batch import read_pack
from megatron_ext.data.corpus import Corpus, Piece
from megatron_ext.data.loss_weights import WeightFiles, source_weights, total_weight
from megatron_ext.data.options import SourceOptions
from megatron_ext.errors import DataError
from megatron_ext.planning import Pack
from megatron_ext.planning.plan import Slice
from tests.train.tiny_run import write_corpus

DOCUMENTS = [np.arange(length, dtype=np.uint16) for length in (5, 0, 3, 8)]
TOKENS = sum(map(len, DOCUMENTS))


def corpus_with(folder: Path, documents: np.ndarray | None = None, tokens: np.ndarray | None = None) -> Corpus:
    paths: dict[str, str] = {}
    for key, values in (("document_weights", documents), ("token_weights", tokens)):
        if values is not None:
            paths[key] = str(folder / f"{key}.npy")
            np.save(paths[key], values)
    return Corpus(SourceOptions("weighted", write_corpus(folder / "corpus", DOCUMENTS), **paths))


def test_packs_carry_the_weight_of_the_token_that_is_predicted(tmp_path: Path) -> None:
    by_document, by_token = np.array([2.0, 9.0, 0.0, 0.5], dtype=np.float32), np.arange(TOKENS, dtype=np.float32)
    corpora = [corpus_with(tmp_path, by_document, by_token)]
    weights = source_weights(corpora)
    pieces = [Piece(0, 3, 2, 6, True), Piece(0, 0, 0, 5, False), Piece(0, 2, 0, 3, False)]
    pack = Pack(0, 1, tuple(Slice(number, 0, len(piece)) for number, piece in enumerate(pieces)))
    batch = read_pack(pack, pieces, corpora, 64, weights=weights)
    first = [0, 5, 5, 8]
    expected = [0.5 * (first[3] + place) for place in (3, 4, 5, 6)]
    expected += [2.0 * place for place in (1, 2, 3, 4)] + [0.0] + [0.0, 0.0, 0.0]
    assert batch.loss_weight.tolist() == expected
    assert total_weight(pieces, weights) == sum(expected)
    halves = [read_pack(Pack(0, 2, pack.slices), pieces, corpora, 64, place, weights).loss_weight for place in (0, 1)]
    assert torch.equal(torch.cat(halves), batch.loss_weight), "ranks that share a pack have the same weights"


def test_weights_of_one_are_no_weights(tmp_path: Path) -> None:
    corpora = [corpus_with(tmp_path, np.ones(4, dtype=np.float32), np.ones(TOKENS, dtype=np.float32))]
    pieces = [Piece(0, 0, 0, 5, False), Piece(0, 3, 0, 4, True)]
    pack = Pack(0, 1, (Slice(0, 0, 5), Slice(1, 0, 4)))
    plain, ones = (read_pack(pack, pieces, corpora, 64, weights=weights) for weights in (None, source_weights(corpora)))
    assert torch.equal(plain.loss_weight, ones.loss_weight)
    assert total_weight(pieces, source_weights(corpora)) == total_weight(pieces, None) == 8.0


def test_sources_without_files_need_none(tmp_path: Path) -> None:
    plain = Corpus(SourceOptions("plain", write_corpus(tmp_path / "plain", DOCUMENTS)))
    assert source_weights([plain]) is None
    weights = source_weights([plain, corpus_with(tmp_path, np.full(4, 0.25, dtype=np.float32))])
    assert total_weight([Piece(0, 0, 0, 5, False), Piece(1, 0, 0, 5, False)], weights) == 4 * 1.0 + 4 * 0.25


def test_the_fingerprint_is_of_the_values(tmp_path: Path) -> None:
    prints = {WeightFiles(corpus_with(tmp_path, np.full(4, value, dtype=np.float32))).fingerprint() for value in (0.5, 0.25, 0.5)}
    assert len(prints) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            np.ones(3, dtype=np.float32),
            r"float32 \[3\]; accepted: float32 \[4\], a weight for each of the documents of source 'weighted'",
        ),
        (np.ones(4, dtype=np.float64), r"float64 \[4\]; accepted: float32"),
        (np.array([1, 1, -1, 1], dtype=np.float32), r"value 2 is -1.0; accepted are finite weights of at least 0"),
        (np.array([1, np.nan, 1, 1], dtype=np.float32), "value 1 is nan"),
        (np.array([{}, 1, 2, 3], dtype=object), r"object \[4\]; accepted: float32"),
    ],
    ids=["length", "dtype", "negative", "nan", "pickle"],
)
def test_unusable_files_are_named(tmp_path: Path, values: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=r"document_weights\.npy: .*" + message):
        source_weights([corpus_with(tmp_path, values)])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    options = SourceOptions("weighted", write_corpus(tmp_path / "corpus", DOCUMENTS), token_weights=str(tmp_path / "none.npy"))
    with pytest.raises(DataError, match=r"none\.npy: .*No such file"):
        source_weights([Corpus(options)])
