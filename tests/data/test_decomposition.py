"""Documents in pieces of powers of two, each once an epoch, and steps of one length by a curriculum that owes every length its share."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.data.corpus import Corpus, Piece
from megatron_ext.data.decomposed_mixture import DecomposedMixture
from megatron_ext.data.decomposition import Bucket, sizes
from megatron_ext.data.length_curriculum import Curriculum, CycleShares, odds
from megatron_ext.data.mixture import Mixture
from megatron_ext.data.options import SourceOptions
from megatron_ext.errors import ConfigError, DataError
from tests.train.tiny_run import random_documents, write_corpus

SMALLEST, LARGEST, STEP, CYCLE = 4, 32, 64, 1000
CURRICULA: list[Curriculum] = ["natural", "uniform", "grow_linear", "grow_p2", "grow_p100", "shrink_p100"]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    folder = tmp_path_factory.mktemp("decomposed")
    documents = {"a": random_documents(40, 90, seed=1), "b": random_documents(25, 30, seed=2)}
    documents["a"][3] = documents["a"][3][:0]
    return [Corpus(SourceOptions(name, write_corpus(folder / name, each))) for name, each in documents.items()]


def mixture_of(corpora: Sequence[Corpus], curriculum: Curriculum = "grow_p2", cycle: int = CYCLE, seed: int = 0) -> DecomposedMixture:
    return DecomposedMixture(corpora, [3, 1][: len(corpora)], seed, LARGEST, SMALLEST, curriculum, cycle)


def epoch_of(bucket: Bucket, epoch: int = 0) -> list[Piece]:
    return [piece for _, piece in islice(bucket.pieces(0, 0, LARGEST, epoch * len(bucket), 0), len(bucket))]


def size_of(piece: Piece) -> int:
    """Of its bucket."""
    return len(piece) if len(piece) >= SMALLEST else 0


@pytest.mark.parametrize(("smallest", "largest"), [(4, 32), (1, 64), (16, 16), (1, 1), (64, 128)])
def test_pieces_of_all_buckets_are_the_documents(corpora: list[Corpus], smallest: int, largest: int) -> None:
    corpus = corpora[0]
    buckets = {size: Bucket(corpus, size, smallest, largest) for size in sizes(smallest, largest)}
    pieces = [piece for bucket in buckets.values() if len(bucket) for piece in epoch_of(bucket)]
    assert len(pieces) == sum(map(len, buckets.values()))
    for document in range(len(corpus)):
        parts = sorted((piece for piece in pieces if piece.document == document), key=lambda piece: piece.start)
        length, rest = corpus.length(document), corpus.length(document) % smallest
        whole = [largest] * (length // largest)
        powers = [1 << power for power in range(20, -1, -1) if smallest <= 1 << power < largest and length % largest >> power & 1]
        assert [len(piece) for piece in parts] == [*whole, *powers, *([rest] if rest else [])]
        assert [token for piece in parts for token in range(piece.start, piece.stop)] == list(range(length))
        assert [piece.has_next for piece in parts] == [piece.stop < length for piece in parts]
    assert all(bucket.num_tokens == sum(map(len, epoch_of(bucket))) for bucket in buckets.values() if len(bucket))


def test_epochs_of_a_bucket_differ_and_hold_the_same(corpora: list[Corpus]) -> None:
    bucket = Bucket(corpora[0], LARGEST, SMALLEST, LARGEST)
    first, second = epoch_of(bucket), epoch_of(bucket, epoch=1)
    assert first != second and set(first) == set(second) and len(set(first)) == len(first)


def test_held_out_documents_are_in_no_bucket(corpora: list[Corpus]) -> None:
    corpus = Corpus(SourceOptions("a", corpora[0].path), held_out=0.4)
    bucket = Bucket(corpus, LARGEST, SMALLEST, LARGEST)
    documents = {piece.document for _, piece in islice(bucket.pieces(0, 0, LARGEST, 0, 0), 200)}
    assert documents == {d for d in range(len(corpus)) if corpus.length(d) >= LARGEST and not corpus.is_held_out(d)}
    everything = Corpus(SourceOptions("a", corpora[0].path), held_out=0.999999)
    assert bucket.trains and not Bucket(everything, LARGEST, SMALLEST, LARGEST).trains
    with pytest.raises(DataError, match="left for training"):
        DecomposedMixture([everything], [1.0], 0, LARGEST, SMALLEST, "natural", 1000)


def test_a_bucket_whose_documents_are_all_held_out_has_no_turn(tmp_path: Path) -> None:
    """The only long document is held out: the lengths of the others are trained on."""
    generator = np.random.default_rng(0)
    documents = [generator.integers(1, 60, length).astype(np.uint16) for length in [20] * 40 + [200]]
    corpus = Corpus(SourceOptions("a", write_corpus(tmp_path / "a", documents)), held_out=0.5)
    seed = next(n for n in range(100) if _held_out_with(tmp_path, documents, n))
    corpus = Corpus(SourceOptions("a", str(tmp_path / f"a{seed}")), held_out=0.5)
    assert corpus.is_held_out(40)
    mixture = DecomposedMixture([corpus], [1.0], 0, 128, 8, "natural", 1000)
    pieces = [piece for _ in range(20) for piece in mixture.take(128)]
    assert {len(piece) for piece in pieces} == {16, 4} and all(piece.document < 40 for piece in pieces)


def _held_out_with(folder: Path, documents: list[np.ndarray], number: int) -> bool:
    """Write the documents with another last one; whether that is held out."""
    changed = [*documents[:-1], np.roll(documents[-1], number)]
    return Corpus(SourceOptions("a", write_corpus(folder / f"a{number}", changed)), held_out=0.5).is_held_out(40)


SHARES = st.lists(st.integers(1, 100), min_size=1, max_size=6).map(lambda counts: [count / sum(counts) for count in counts])


@given(shares=SHARES, curriculum=st.sampled_from(CURRICULA), cycle=st.integers(100, 5000), data=st.data())
@settings(max_examples=30, deadline=None)
def test_cycle_shares_are_a_fluid_that_drains_buckets_by_odds(
    shares: list[float], curriculum: Curriculum, cycle: int, data: st.DataObject
) -> None:
    curve = CycleShares(tuple(shares), odds(curriculum, shares), cycle)
    left, weights = np.array(shares) * cycle, np.array(curve.odds)
    parts = 400
    for part in range(1, parts + 1):  # pour out in small amounts what is left, by the odds of what is not empty
        room = cycle / parts
        while room > 1e-9 and left.sum() > 1e-6:
            flows = np.where(left > 1e-9, weights, 0.0)
            flows *= room / flows.sum()
            flows = np.minimum(flows, left)
            left, room = left - flows, room - flows.sum()
        if part % 40 == 0:
            owed = [curve.amount(bucket, 0, cycle * part / parts) for bucket in range(len(shares))]
            assert owed == pytest.approx((np.array(shares) * cycle - left).tolist(), abs=1e-5 * cycle)
    begin, tokens = data.draw(st.integers(0, 3 * cycle)), data.draw(st.integers(1, 2 * cycle))
    for bucket in range(len(shares)):
        start, end = curve.span(bucket, begin, 0, tokens)
        assert start <= 1e-6 * cycle + cycle and curve.amount(bucket, begin, begin + end) == pytest.approx(tokens, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("curriculum", CURRICULA)
def test_a_step_has_one_length_and_every_length_what_it_is_owed(corpora: list[Corpus], curriculum: Curriculum) -> None:
    mixture = mixture_of(corpora, curriculum)
    everything = {size: 3 / 4 * _share(corpora[0], size) + 1 / 4 * _share(corpora[1], size) for size in (0, 4, 8, 16, 32)}
    curve = CycleShares(tuple(everything.values()), odds(curriculum, list(everything.values())), CYCLE)
    taken: Counter[int] = Counter()
    for _ in range(150):
        pieces = mixture.take(STEP)
        [size] = {size_of(piece) for piece in pieces}
        assert sum(map(len, pieces)) == STEP if size else STEP - SMALLEST < sum(map(len, pieces)) <= STEP
        taken[size] += sum(map(len, pieces))
        for number, each in enumerate(everything):
            assert abs(taken[each] - curve.amount(number, 0, taken.total())) <= STEP + 1e-6


def _share(corpus: Corpus, size: int) -> float:
    """Of the tokens of a corpus, by its definition."""
    tokens = 0
    for document in range(len(corpus)):
        length = corpus.length(document)
        tokens += length % SMALLEST if size == 0 else length // LARGEST * LARGEST if size == LARGEST else length & size
    return tokens / corpus.num_tokens


def test_lengths_grow_within_a_cycle_and_begin_again(corpora: list[Corpus]) -> None:
    def lengths(curriculum: Curriculum) -> np.ndarray:
        mixture = mixture_of(corpora, curriculum, cycle=40 * STEP)
        return np.array([np.mean([len(piece) for piece in mixture.take(STEP)]) for _ in range(80)])

    grow, shrink, natural = (lengths(curriculum) for curriculum in ("grow_p100", "shrink_p100", "natural"))
    for begin in (0, 40):
        assert grow[begin : begin + 12].mean() * 2 < grow[begin + 28 : begin + 40].mean()
        assert shrink[begin : begin + 12].mean() > 2 * shrink[begin + 28 : begin + 40].mean()
    assert 0.6 < natural[:20].mean() / natural[20:40].mean() < 1.6, "the control: natural shares do not change"


def test_sources_have_their_shares_within_a_bucket_and_each_piece_once(corpora: list[Corpus]) -> None:
    mixture = mixture_of(corpora, "natural")
    pieces = [piece for _ in range(400) for piece in mixture.take(STEP)]
    for size in (0, 4, 8, 16, 32):
        for source, corpus in enumerate(corpora):
            bucket = Bucket(corpus, size, SMALLEST, LARGEST)
            mine = [piece for piece in pieces if piece.source == source and size_of(piece) == size]
            epochs = [mine[begin : begin + len(bucket)] for begin in range(0, len(mine) - len(bucket), max(1, len(bucket)))]
            assert all(len(set(epoch)) == len(bucket) for epoch in epochs) and (epochs or not len(bucket))
    tokens = Counter[int]()
    for piece in pieces:
        tokens[piece.source] += len(piece)
    assert tokens[0] / tokens.total() == pytest.approx(0.75, abs=0.01)
    assert mixture.epochs() == pytest.approx({c.name: tokens[i] / c.num_tokens for i, c in enumerate(corpora)}, rel=0.05)


@given(stops=st.sets(st.integers(1, 59)), curriculum=st.sampled_from(CURRICULA))
@settings(max_examples=15, deadline=None)
def test_resuming_anywhere_in_a_cycle_changes_nothing(corpora: list[Corpus], stops: set[int], curriculum: Curriculum) -> None:
    straight = mixture_of(corpora, curriculum)
    expected = [straight.take(STEP) for _ in range(60)]
    mixture, taken = mixture_of(corpora, curriculum), []
    for step in range(60):
        if step in stops:
            state: dict[str, Any] = json.loads(json.dumps(mixture.state_dict()))
            mixture = mixture_of(corpora, curriculum)
            mixture.load_state_dict(state)
        taken.append(mixture.take(STEP))
    assert taken == expected


def test_metadata_and_scores_do_not_go_with_it(corpora: list[Corpus], tmp_path: Path) -> None:
    path, scores = corpora[0].path, str(tmp_path / "scores.npy")
    np.save(scores, np.zeros(len(corpora[0]), dtype=np.float32))
    for options, what in (({"metadata": path}, "metadata"), ({"scores": scores, "order": "ascending"}, "an order by scores")):
        with pytest.raises(ConfigError, match=rf"source 'a' has {what}; accepted with data\.decomposition"):
            mixture_of([Corpus(SourceOptions("a", path, **options))])


def test_a_copy_goes_on_by_itself(corpora: list[Corpus]) -> None:
    mixture = mixture_of(corpora)
    for _ in range(7):
        mixture.take(STEP)
    copy = mixture.copy()
    ahead = [copy.take(STEP) for _ in range(20)]
    assert [mixture.take(STEP) for _ in range(20)] == ahead


def test_changed_data_are_refused_and_accepted_with_the_key(corpora: list[Corpus], tmp_path: Path) -> None:
    mixture = mixture_of(corpora)
    history = [mixture.take(STEP) for _ in range(30)]
    state = json.loads(json.dumps(mixture.state_dict()))
    assert len(json.dumps(state)) < 3000
    other = Corpus(SourceOptions("a", write_corpus(tmp_path / "a", random_documents(41, 90))))
    variants = {
        "files": mixture_of([other, corpora[1]]),
        "curriculum": mixture_of(corpora, "uniform"),
        "cycle": mixture_of(corpora, cycle=CYCLE + 1),
        "seed": mixture_of(corpora, seed=1),
        "smallest": DecomposedMixture(corpora, [3, 1], 0, LARGEST, 8, "grow_p2", CYCLE),
        "plain": Mixture(corpora, [3, 1], 0, LARGEST),
    }
    for changed in variants.values():
        with pytest.raises(DataError, match=r"data\.decomposition or a stage"):
            changed.load_state_dict(state)
        changed.load_state_dict(state, allow_changed=True)
        assert changed.take(STEP)
    plain = Mixture(corpora, [3, 1], 0, LARGEST)
    plain.load_state_dict(state, allow_changed=True)
    assert plain.total == sum(sum(map(len, pieces)) for pieces in history), "a run without decomposition knows where it is"
    resumed = mixture_of(corpora, "uniform")
    resumed.load_state_dict(state, allow_changed=True)
    shares = [size_of(resumed.take(STEP)[0]) for _ in range(5)]
    assert len(set(shares)) == 5, "counting begins anew: by uniform odds the first five steps are of five lengths"
