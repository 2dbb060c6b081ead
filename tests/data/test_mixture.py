"""Shares at every point, one order whatever the step size and however often the run restarts, and a state of a few integers."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.data.corpus import Corpus, Piece
from megatron_ext.data.mixture import Mixture
from megatron_ext.data.options import SourceOptions
from megatron_ext.errors import ConfigError, DataError
from tests.train.tiny_run import random_documents, write_corpus

SEQUENCE = 16
SHARES = (0.6, 0.3, 0.1)


def corpus(folder: Path, name: str, documents: Sequence[np.ndarray], held_out: float = 0.0, **options: float) -> Corpus:
    return Corpus(SourceOptions(name, write_corpus(folder / name, documents), **options), held_out)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    """Three sources with documents of 1 to 50 tokens, one of them empty."""
    folder = tmp_path_factory.mktemp("mixture")
    sizes = {"a": 40, "b": 13, "c": 7}
    documents = {name: random_documents(size, 50, seed=size) for name, size in sizes.items()}
    documents["b"][4] = documents["b"][4][:0]
    return [corpus(folder, name, documents[name]) for name in sizes]


def order(mixture: Mixture, pieces: int, tokens_per_step: int) -> list[Piece]:
    taken: list[Piece] = []
    while len(taken) < pieces:
        taken += mixture.take(tokens_per_step)
    return taken[:pieces]


@pytest.mark.parametrize("shares", [SHARES, (1, 1, 1), (98, 1, 1)])
def test_shares_hold_at_every_prefix_to_within_one_piece(corpora: list[Corpus], shares: tuple[float, ...]) -> None:
    taken, total = Counter[int](), 0
    for piece in order(Mixture(corpora, shares, seed=1, sequence_length=SEQUENCE), 2000, 64):
        taken[piece.source] += len(piece)
        total += len(piece)
        for source, share in enumerate(shares):
            assert abs(taken[source] - total * share / sum(shares)) <= SEQUENCE + 1e-6


@given(weights=st.lists(st.integers(1, 1000), min_size=2, max_size=12))
@settings(max_examples=25, deadline=None)
def test_shares_of_many_sources(corpora: list[Corpus], weights: list[int]) -> None:
    mixture = Mixture([_renamed(corpora[i % 3], str(i)) for i in range(len(weights))], weights, 0, SEQUENCE)
    taken, total = Counter[int](), 0
    for piece in order(mixture, 400, 64):
        taken[piece.source] += len(piece)
        total += len(piece)
        for source, weight in enumerate(weights):
            assert abs(taken[source] - total * weight / sum(weights)) <= SEQUENCE + 1e-6


@given(data=st.data(), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_order_does_not_depend_on_step_size_or_restarts(corpora: list[Corpus], data: st.DataObject, seed: int) -> None:
    expected = order(Mixture(corpora, SHARES, seed, SEQUENCE), 400, 10_000)
    mixture = Mixture(corpora, SHARES, seed, SEQUENCE)
    taken: list[Piece] = []
    while len(taken) < 400:
        room = data.draw(st.integers(SEQUENCE, 150), label="tokens_per_step")
        step = mixture.take(room)
        assert sum(map(len, step)) <= room
        taken += step
        if data.draw(st.booleans(), label="restart"):
            text = json.dumps(mixture.state_dict())
            mixture = Mixture(corpora, SHARES, seed, SEQUENCE)
            mixture.load_state_dict(json.loads(text))
    assert taken[:400] == expected


def test_a_copy_goes_on_by_itself(corpora: list[Corpus]) -> None:
    mixture = Mixture(corpora, [1.0] * len(corpora), 3, 50)
    mixture.take(333)
    copy = mixture.copy()
    ahead = [copy.take(200) for _ in range(5)]
    assert [mixture.take(200) for _ in range(5)] == ahead


def test_a_step_is_full(corpora: list[Corpus]) -> None:
    """Pieces are taken until the next would exceed the room, not fewer."""
    mixture = Mixture(corpora, SHARES, 0, SEQUENCE)
    whole = order(Mixture(corpora, SHARES, 0, SEQUENCE), 500, 10_000)
    begin = 0
    for _ in range(40):
        step = mixture.take(100)
        begin += len(step)
        assert sum(map(len, step)) <= 100 < sum(map(len, step)) + len(whole[begin])


def test_every_document_once_per_epoch_and_every_token_of_it(corpora: list[Corpus]) -> None:
    single = corpora[1]
    mixture = Mixture([single], [1.0], seed=3, sequence_length=SEQUENCE)
    tokens = single.dataset.num_tokens
    pieces = order(mixture, 500, 10_000)
    orders = []
    for _ in range(3):
        epoch, seen = [], 0
        while seen < tokens:
            epoch.append(pieces.pop(0))
            seen += len(epoch[-1])
        documents = list(dict.fromkeys(piece.document for piece in epoch))
        assert sorted(documents) == [d for d in range(len(single)) if single.length(d)]
        for document in documents:
            parts = [piece for piece in epoch if piece.document == document]
            borders = [(piece.start, piece.stop) for piece in parts]
            assert borders == [(b, min(b + SEQUENCE, single.length(document))) for b in range(0, single.length(document), SEQUENCE)]
            assert [piece.has_next for piece in parts] == [True] * (len(parts) - 1) + [False]
        orders.append(documents)
    assert orders[0] != orders[1] != orders[2], "each epoch has an order of its own"


def test_seeds_differ_and_sources_do_not_follow_each_other(corpora: list[Corpus]) -> None:
    first, second = (order(Mixture(corpora[:1], [1.0], seed, SEQUENCE), 50, 100) for seed in (0, 1))
    assert first != second
    twins = [corpora[0], _renamed(corpora[0], "twin")]
    pieces = order(Mixture(twins, [1, 1], 0, SEQUENCE), 100, 100)
    assert [p.document for p in pieces if p.source == 0][:20] != [p.document for p in pieces if p.source == 1][:20]


def _renamed(original: Corpus, name: str) -> Corpus:
    return Corpus(SourceOptions(name, original.path), original.held_out)


def test_epochs_count_what_was_read(corpora: list[Corpus]) -> None:
    mixture = Mixture(corpora[:1], [1.0], 0, SEQUENCE)
    assert mixture.epochs() == {"a": 0.0}
    for epoch in (1, 2):
        left = corpora[0].dataset.num_tokens
        while left:
            left -= sum(map(len, mixture.take(min(left, 64))))
        assert mixture.epochs() == {"a": epoch}


def test_state_is_a_few_integers_whatever_the_corpus(tmp_path: Path) -> None:
    sizes = []
    for count in (20, 5000):
        mixture = Mixture([corpus(tmp_path, f"c{count:04}", random_documents(count, 30))], [1.0], 0, SEQUENCE)
        mixture.take(200)
        state = mixture.state_dict()
        assert all(type(value) is int for value in state["cursors"][f"c{count:04}"].values())
        sizes.append(len(json.dumps(state)))
    assert abs(sizes[1] - sizes[0]) <= 4, "digits of a position"


def test_changed_data_are_refused_and_accepted_with_the_key(corpora: list[Corpus], tmp_path: Path) -> None:
    mixture = Mixture(corpora, SHARES, 0, SEQUENCE)
    order(mixture, 100, 64)
    state = json.loads(json.dumps(mixture.state_dict()))
    other = [corpus(tmp_path, "a", random_documents(41, 50)), *corpora[1:]]
    variants = {
        "files": Mixture(other, SHARES, 0, SEQUENCE),
        "shares": Mixture(corpora, (0.5, 0.4, 0.1), 0, SEQUENCE),
        "seed": Mixture(corpora, SHARES, 1, SEQUENCE),
        "sequence length": Mixture(corpora, SHARES, 0, SEQUENCE + 1),
        "split": Mixture([Corpus(SourceOptions(c.name, c.path), held_out=0.1) for c in corpora], SHARES, 0, SEQUENCE),
        "sources": Mixture(corpora[:2], SHARES[:2], 0, SEQUENCE),
    }
    for changed in variants.values():
        with pytest.raises(DataError, match=r"the training data changed .* Set checkpoint\.allow_changed_data=true"):
            changed.load_state_dict(state)
        changed.load_state_dict(state, allow_changed=True)
        for name, cursor in changed.state_dict()["cursors"].items():
            assert cursor["position"] >= state["cursors"][name]["position"] and cursor["tokens"] == 0
        taken = order(changed, 300, 64)
        totals = [sum(len(piece) for piece in taken if piece.source == source) for source in range(len(changed.corpora))]
        for seen, share in zip(totals, changed.expected_tokens(1), strict=True):
            assert abs(seen - share * sum(totals)) <= 2 * (SEQUENCE + 1), "shares count anew"


def test_reading_a_source_too_often_is_refused_before_training(tmp_path: Path) -> None:
    limited = corpus(tmp_path, "small", [np.arange(100, dtype=np.uint16)], max_epochs=2.0)
    free = corpus(tmp_path, "large", [np.arange(1000, dtype=np.uint16)])
    mixture = Mixture([limited, free], [0.5, 0.5], 0, SEQUENCE)
    mixture.check_epochs(400)
    message = r"source 'small' would be read 2\.50 times by 500 tokens with a share of 0\.500; its max_epochs is 2\.0"
    with pytest.raises(ConfigError, match=message):
        mixture.check_epochs(500)


def test_held_out_documents_are_never_trained_on(corpora: list[Corpus]) -> None:
    held_out = Corpus(SourceOptions("a", corpora[0].path), held_out=0.3)
    seen = {piece.document for piece in order(Mixture([held_out], [1.0], 0, SEQUENCE), 500, 64)}
    assert seen == {d for d in range(len(held_out)) if not held_out.is_held_out(d)} and len(seen) < len(held_out)


def test_a_restart_in_the_middle_of_a_document_continues_there(tmp_path: Path) -> None:
    long = corpus(tmp_path, "long", [np.arange(1000, dtype=np.uint16)])
    mixture = Mixture([long], [1.0], 0, SEQUENCE)
    first = mixture.take(3 * SEQUENCE)
    again = Mixture([long], [1.0], 0, SEQUENCE)
    again.load_state_dict(mixture.state_dict())
    assert again.take(SEQUENCE) == [replace(first[-1], start=3 * SEQUENCE, stop=4 * SEQUENCE)]


def test_random_walks_of_states_agree(corpora: list[Corpus]) -> None:
    """Any saved state, taken up by any later mixture, gives what followed it the first time."""
    mixture = Mixture(corpora, SHARES, 0, SEQUENCE)
    history = [(mixture.state_dict(), mixture.take(80)) for _ in range(60)]
    for number in random.Random(0).sample(range(50), 10):
        again = Mixture(corpora, SHARES, 0, SEQUENCE)
        again.load_state_dict(json.loads(json.dumps(history[number][0])))
        assert [again.take(80) for _ in range(10)] == [step for _, step in history[number : number + 10]]
