"""Documents by length, by a budget of tokens and by score; each once an epoch, in an order that is always the same."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.data.corpus import Corpus
from megatron_ext.data.mixture import Mixture
from megatron_ext.data.options import DataOptions, SourceOptions
from megatron_ext.data.validation import validation_sets
from megatron_ext.errors import ConfigError, DataError
from tests.train.tiny_run import random_documents, write_corpus

COUNT = 80


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of documents of 1 to 60 tokens, one of them empty, and scores of five values."""
    folder = tmp_path_factory.mktemp("selection")
    documents = random_documents(COUNT, 60, seed=3)
    documents[7] = documents[7][:0]
    write_corpus(folder / "c", documents)
    np.save(folder / "scores.npy", np.random.default_rng(0).integers(0, 5, COUNT).astype(np.float32))
    return folder


def opened(folder: Path, held_out: float = 0.0, name: str = "c", **options: Any) -> Corpus:
    return Corpus(SourceOptions(name, str(folder / "c"), **options), held_out)


def epoch_of(corpus: Corpus, seed: int = 0, epoch: int = 0) -> list[int]:
    """Documents of one epoch, in order."""
    begin = epoch * len(corpus)
    documents: list[int] = []
    for position, piece in corpus.pieces(0, seed, 10**6, begin, 0):
        if position >= begin + len(corpus):
            return documents
        documents.append(piece.document)
    raise AssertionError("pieces never end")


def scores_of(folder: Path, documents: list[int]) -> list[float]:
    return np.load(folder / "scores.npy")[documents].tolist()


def test_one_corpus_is_a_long_and_a_short_source(folder: Path) -> None:
    whole, long, short = opened(folder), opened(folder, min_tokens=31), opened(folder, max_tokens=30)
    assert sorted(epoch_of(long)) == [d for d in range(COUNT) if whole.length(d) >= 31]
    assert sorted(epoch_of(short)) == [d for d in range(COUNT) if 0 < whole.length(d) <= 30]
    assert long.num_tokens + short.num_tokens == whole.num_tokens
    middle = opened(folder, min_tokens=20, max_tokens=40)
    assert {middle.length(document) for document in epoch_of(middle)} <= set(range(20, 41))


def test_long_and_short_have_their_shares_of_tokens(folder: Path) -> None:
    mixture = Mixture([opened(folder, name="long", min_tokens=31), opened(folder, name="short", max_tokens=30)], [0.6, 0.4], 0, 16)
    taken, total = 0, 0
    for piece in (piece for _ in range(100) for piece in mixture.take(64)):
        taken, total = taken + len(piece) * (piece.source == 0), total + len(piece)
        assert abs(taken - 0.6 * total) <= 16 + 1e-6


@pytest.mark.parametrize("options", [{}, {"max_tokens": 40}, {"subset_tokens": 300}], ids=str)
def test_epochs_of_a_selection_hold_the_same_documents_in_other_orders(folder: Path, options: dict[str, int]) -> None:
    corpus = opened(folder, **options)
    first, second = epoch_of(corpus), epoch_of(corpus, epoch=1)
    assert sorted(first) == sorted(set(first)) == sorted(second) and first != second


def test_a_subset_has_the_tokens_asked_for_and_is_the_same_for_every_seed(folder: Path) -> None:
    corpus = opened(folder, subset_tokens=500)
    chosen = epoch_of(corpus)
    lengths = [corpus.length(document) for document in chosen]
    assert 500 <= sum(lengths) < 500 + 60 and corpus.num_tokens == sum(lengths)
    assert sorted(chosen) == sorted(epoch_of(corpus, seed=9)), "the seed of a run orders the subset, it does not choose it"
    assert set(chosen) < set(epoch_of(opened(folder, subset_tokens=900))), "a larger subset has the same documents and more"
    assert set(chosen) != set(epoch_of(opened(folder, name="other", subset_tokens=500)))


def test_the_best_documents_make_the_subset(folder: Path) -> None:
    corpus = opened(folder, subset_tokens=700, subset_by="score", scores=str(folder / "scores.npy"))
    chosen = epoch_of(corpus)
    inside, outside = scores_of(folder, chosen), scores_of(folder, [d for d in range(COUNT) if d not in chosen and corpus.length(d)])
    assert min(inside) >= max(outside) and len(set(inside)) > 1


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_sorted_by_score_and_ties_at_random(folder: Path, order: Any) -> None:
    corpus = opened(folder, order=order, scores=str(folder / "scores.npy"))
    documents = epoch_of(corpus)
    scores = scores_of(folder, documents)
    assert scores == sorted(scores, reverse=order == "descending")
    assert sorted(documents) == [d for d in range(COUNT) if corpus.length(d)]
    ties = [document for document, score in zip(documents, scores, strict=True) if score == 2.0]
    assert ties != sorted(ties) and ties != sorted(ties, reverse=True), "equal scores are shuffled"
    assert documents == epoch_of(corpus, epoch=1) and documents != epoch_of(corpus, seed=1)
    assert documents != epoch_of(opened(folder)), "the control: without order they are shuffled"


def test_curriculum_resumes_anywhere(folder: Path) -> None:
    def made() -> Mixture:
        sorted_source = opened(folder, order="ascending", scores=str(folder / "scores.npy"))
        return Mixture([sorted_source, opened(folder, name="few", subset_tokens=300, min_tokens=5)], [3, 1], 0, 16)

    mixture = made()
    history = [(json.dumps(mixture.state_dict()), mixture.take(80)) for _ in range(60)]
    for step in (0, 1, 17, 40):
        again = made()
        again.load_state_dict(json.loads(history[step][0]))
        assert [again.take(80) for _ in range(15)] == [pieces for _, pieces in history[step : step + 15]]


def test_held_out_documents_take_no_room_in_a_subset(folder: Path) -> None:
    corpus = opened(folder, held_out=0.4, subset_tokens=500)
    chosen = epoch_of(corpus)
    assert not any(corpus.is_held_out(document) for document in chosen)
    assert sum(corpus.length(document) for document in chosen) >= 500 and corpus.training_tokens == corpus.num_tokens
    data = DataOptions([SourceOptions("c", str(folder / "c"), subset_tokens=500)], 16, 64, validation_fraction=0.4)
    [held_out] = validation_sets(data, [corpus], 10**6)
    everything = {d for d in range(COUNT) if corpus.length(d) > 1 and corpus.is_held_out(d)}
    assert {piece.document for piece in held_out.pieces} == everything, "validation does not shrink with the subset"


def test_the_choice_is_part_of_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    scores, other = str(folder / "scores.npy"), str(tmp_path / "other.npy")
    np.save(other, np.zeros(COUNT, dtype=np.float32))
    choices = [
        {},
        {"min_tokens": 2},
        {"max_tokens": 30},
        {"subset_tokens": 300},
        {"subset_tokens": 300, "subset_by": "score", "scores": scores},
        {"order": "ascending", "scores": scores},
        {"order": "descending", "scores": scores},
        {"order": "ascending", "scores": other},
    ]
    prints = [Mixture([opened(folder, **choice)], [1.0], 0, 16).fingerprint() for choice in choices]
    assert len(set(prints)) == len(prints)
    state = Mixture([opened(folder)], [1.0], 0, 16).state_dict()
    with pytest.raises(DataError, match="the training data changed"):
        Mixture([opened(folder, min_tokens=2)], [1.0], 0, 16).load_state_dict(state)


def test_scores_that_cannot_be_used_are_named(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "scores.npy"
    bad = np.zeros(COUNT, dtype=np.float32)
    bad[11] = np.nan
    objects = np.empty(COUNT, dtype=object)
    files = {"short": bad[:-1], "float64": np.zeros(COUNT), "table": np.zeros((COUNT, 1), dtype=np.float32), "objects": objects, "nan": bad}
    messages = {
        "short": r"float32 \[79\]; accepted: a \.npy file of float32 \[80\], a score for each document of source 'c'",
        "float64": r"float64 \[80\]; accepted",
        "table": r"float32 \[80, 1\]; accepted",
        "objects": r"object \[80\]; accepted",
        "nan": "the score of document 11 of source 'c' is nan; accepted: finite numbers",
    }
    for name, values in files.items():
        np.save(path, values, allow_pickle=name == "objects")
        with pytest.raises(DataError, match=messages[name]):
            opened(folder, order="ascending", scores=str(path))
    for content in (b"", b"no array"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"scores\.npy: .*; accepted: a \.npy file"):
            opened(folder, order="ascending", scores=str(path))
    with pytest.raises(DataError, match=r"missing\.npy.*; accepted"):
        opened(folder, order="ascending", scores=str(tmp_path / "missing.npy"))


def test_nothing_left_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"none of 80 documents of source 'c' has 61 to any number of tokens .*; the longest has \d\d"):
        opened(folder, min_tokens=61)
    corpus = opened(folder)
    with pytest.raises(DataError, match=rf"source 'c' has {corpus.num_tokens:,} tokens to train on; its subset_tokens is 1,000,000"):
        opened(folder, subset_tokens=1_000_000)


REFUSED = [
    ({"order": "ascending"}, "order: 'ascending'; accepted: shuffled without scores"),
    ({"subset_by": "score", "subset_tokens": 5}, "subset_by: 'score'; accepted: hash without scores"),
    ({"subset_by": "score", "scores": "s"}, "subset_by: 'score'; accepted: hash without subset_tokens"),
    ({"scores": "s"}, "scores: 's'; accepted: null, because neither order nor subset_by uses them"),
    ({"min_tokens": 0}, "min_tokens: 0; accepted: at least 1, or null"),
    ({"min_tokens": 5, "max_tokens": 4}, r"max_tokens: 4; accepted: at least min_tokens \(5\), or null"),
    ({"subset_tokens": 0}, "subset_tokens: 0; accepted: at least 1, or null"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[message[:12] for _, message in REFUSED])
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SourceOptions("c", "c", **options)


def test_orders_start_anywhere(folder: Path) -> None:
    corpus = opened(folder, max_tokens=40)
    order = list(islice(corpus.shuffled("7", 0), 100))
    begin = order[30][0]
    assert list(islice(corpus.shuffled("7", begin), 70)) == order[30:]
