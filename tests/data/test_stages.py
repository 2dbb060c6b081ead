"""Stages: exact shares in each, no token lost or read twice where they meet, and resuming anywhere."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.data.corpus import Corpus, Piece
from megatron_ext.data.mixture import Mixture
from megatron_ext.data.options import DataOptions, SourceOptions, StageOptions
from megatron_ext.data.shares import ConstantShares, Fade, FadingShares
from megatron_ext.data.stages import Stage, expected_tokens, stage_at
from megatron_ext.errors import DataError
from tests.train.tiny_run import random_documents, write_corpus

STEP = 128
LATER = (
    Stage(1000, 64, ConstantShares.of([1, 0, 3])),
    Stage(2500, 32, FadingShares((0.5, 0.5, 0.0), (0.0, 0.0, 1.0), Fade(0.9, 0.1, 6000, "cosine"))),
    Stage(7000, 96, ConstantShares.of([0, 1, 1])),
)

BY_STEPS = [replace(stage, begin=STEP * steps, begin_step=steps) for stage, steps in zip(LATER, (10, 30, 35), strict=True)]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    folder = tmp_path_factory.mktemp("stages")
    sizes = {"a": 20, "b": 13, "c": 9}
    return [Corpus(SourceOptions(name, write_corpus(folder / name, random_documents(n, 200, seed=n)))) for name, n in sizes.items()]


def staged(corpora: Sequence[Corpus], seed: int = 1, later: Sequence[Stage] = LATER) -> Mixture:
    return Mixture(corpora, (0.5, 0.3, 0.2), seed, 16, later=later)


def steps(mixture: Mixture, count: int) -> list[list[Piece]]:
    return [mixture.take(STEP) for _ in range(count)]


def before_stages(corpora: Sequence[Corpus], weights: Sequence[float], seed: int, sequence_length: int) -> Iterator[Piece]:
    """The order of a mixture without stages, by its definition: weighted fair queueing with constant shares."""
    shares = [weight / sum(weights) for weight in weights]
    streams = [corpus.pieces(source, seed, sequence_length, 0, 0) for source, corpus in enumerate(corpora)]
    ahead, taken = [next(stream)[1] for stream in streams], [0] * len(corpora)
    while True:
        starts = [tokens / share for tokens, share in zip(taken, shares, strict=True)]
        ends = [start + len(piece) / share for start, piece, share in zip(starts, ahead, shares, strict=True)]
        now = max(sum(taken), min(starts))
        source = min((i for i, start in enumerate(starts) if start <= now), key=lambda i: (ends[i], i))
        yield ahead[source]
        taken[source] += len(ahead[source])
        ahead[source] = next(streams[source])[1]


def test_without_stages_the_order_is_what_it_was(corpora: list[Corpus]) -> None:
    for weights in ((0.6, 0.3, 0.1), (1, 1, 1), (98, 1, 1)):
        mixture = Mixture(corpora, weights, 5, 16)
        expected = before_stages(corpora, weights, 5, 16)
        assert all(piece == next(expected) for step in steps(mixture, 100) for piece in step)


def test_a_step_belongs_to_the_stage_in_which_it_begins(corpora: list[Corpus]) -> None:
    mixture = staged(corpora)
    for _ in range(80):
        stage = stage_at(mixture.stages, mixture.total, mixture.steps)
        pieces = mixture.take(STEP)
        assert mixture.stage == stage
        assert max(map(len, pieces)) <= stage.sequence_length
        assert {piece.source for piece in pieces} <= {i for i in range(3) if stage.shares.amount(i, 0, 10**6) > 0}
    assert mixture.stage == LATER[-1]


def test_shares_of_each_stage_hold_at_every_point_to_within_one_piece(corpora: list[Corpus]) -> None:
    mixture = staged(corpora)
    stage, begin, taken = mixture.stage, 0, Counter[int]()
    for _ in range(100):
        total = mixture.total
        for piece in mixture.take(STEP):
            if mixture.stage != stage:
                stage, begin, taken = mixture.stage, total, Counter()
            taken[piece.source] += len(piece)
            for source in range(3):
                owed = stage.shares.amount(source, begin, begin + taken.total())
                assert abs(taken[source] - owed) <= stage.sequence_length + 1e-6


def test_every_token_once_an_epoch_across_stages(corpora: list[Corpus]) -> None:
    pieces = [piece for step in steps(staged(corpora), 150) for piece in step]
    for source, corpus in enumerate(corpora):
        read = np.concatenate([corpus.tokens(p.document, p.start, p.stop) for p in pieces if p.source == source])
        order = [document for _, document in zip(range(10 * len(corpus)), corpus.pieces(source, 1, 10**6, 0, 0), strict=False)]
        whole = np.concatenate([corpus.tokens(p.document, 0, p.stop) for _, p in order])
        assert len(read) > corpus.num_tokens and np.array_equal(read, whole[: len(read)]), "documents go on where they were left"


def test_stages_that_count_steps_begin_with_them_however_full_steps_are(corpora: list[Corpus]) -> None:
    """Steps of 128 tokens of documents cut at 64 to 96 are not full, so tokens come later than the steps that they would fill."""
    mixture = staged(corpora, later=BY_STEPS)
    seen = []
    for _ in range(100):
        mixture.take(STEP)
        seen.append(mixture.stages.index(mixture.stage))
    assert seen == [0] * 10 + [1] * 20 + [2] * 5 + [3] * 65
    assert mixture.total < 0.95 * 100 * STEP and mixture.total < BY_STEPS[2].begin + 65 * STEP, "the same places in tokens come later"


def test_the_same_stages_in_tokens_would_begin_late(corpora: list[Corpus]) -> None:
    """What the test above must see: with tokens for steps, the last stage begins some steps later."""
    mixture = staged(corpora, later=[replace(stage, begin_step=None) for stage in BY_STEPS])
    steps(mixture, 36)
    assert mixture.stage != mixture.stages[-1]


def test_a_state_without_steps_cannot_continue_in_stages_that_count_them(corpora: list[Corpus]) -> None:
    mixture = staged(corpora)
    steps(mixture, 3)
    state = mixture.state_dict()
    del state["steps"]
    staged(corpora).load_state_dict(state)
    with pytest.raises(DataError, match="how many steps"):
        staged(corpora, later=BY_STEPS).load_state_dict(state, allow_changed=True)


@pytest.mark.parametrize(
    ("stages", "begins"),
    [
        ([{"share": 0.1}, {"share": 0.2}, {"share": 0.55}, {}], [10, 30, 85]),
        ([{"share": 0.999}, {}], [99]),
        ([{"share": 0.001}, {"share": 0.001}, {}], [1, 2]),
        ([{"tokens": 250}, {"tokens": 1000}, {"share": 0.5}, {}], [250, 1250, 62]),
        ([], []),
    ],
)
def test_shares_come_to_whole_steps_and_leave_the_last_stage_its_own(stages: list[dict], begins: list[int]) -> None:
    """Of 100 steps of 100 tokens. Tokens before a share count as full steps: 12.5, and 50 more."""
    options = DataOptions([SourceOptions("a", "a")], 64, 100, stages=[StageOptions(**each) for each in stages])
    expected = [(each, None) if "tokens" in stage else (100 * each, each) for each, stage in zip(begins, stages, strict=False)]
    assert options.stage_begins(100) == [(0, None), *expected]


@given(stops=st.sets(st.integers(1, 99)), later=st.sampled_from([LATER, LATER[1:], (), BY_STEPS]))
@settings(max_examples=12, deadline=None)
def test_resuming_in_any_stage_changes_nothing(corpora: list[Corpus], stops: set[int], later: Sequence[Stage]) -> None:
    expected = steps(staged(corpora, later=later), 100)
    mixture, taken = staged(corpora, later=later), []
    for step in range(100):
        if step in stops:
            text = json.dumps(mixture.state_dict())
            assert len(text) < 400, "a few integers"
            mixture = staged(corpora, later=later)
            mixture.load_state_dict(json.loads(text))
        taken.append(mixture.take(STEP))
    assert taken == expected


def test_a_copy_walks_into_later_stages_by_itself(corpora: list[Corpus]) -> None:
    mixture = staged(corpora)
    steps(mixture, 5)
    ahead = steps(mixture.copy(), 60)
    assert steps(mixture, 60) == ahead


def test_changed_stages_are_refused_and_accepted_with_the_key(corpora: list[Corpus]) -> None:
    mixture = staged(corpora)
    steps(mixture, 30)
    state = json.loads(json.dumps(mixture.state_dict()))
    variants = {
        "length": (Stage(1001, *_rest(LATER[0])), *LATER[1:]),
        "sequence": (Stage(1000, 65, LATER[0].shares), *LATER[1:]),
        "shares": (Stage(1000, 64, ConstantShares.of([2, 0, 3])), *LATER[1:]),
        "fewer": LATER[:1],
        "none": (),
    }
    for later in variants.values():
        changed = staged(corpora, later=later)
        with pytest.raises(DataError, match="a stage that has begun"):
            changed.load_state_dict(state)
        changed.load_state_dict(state, allow_changed=True)
        assert changed.total == mixture.total and changed.stage == stage_at(changed.stages, mixture.total, mixture.steps), (
            "the run is where it was"
        )


def test_stages_to_come_may_be_changed(corpora: list[Corpus]) -> None:
    mixture = staged(corpora)
    steps(mixture, 30)
    state, ahead = json.loads(json.dumps(mixture.state_dict())), steps(mixture, 20)
    assert mixture.stage == LATER[1]
    longer = staged(corpora, later=(*LATER[:2], Stage(9000, 8, LATER[2].shares)))
    longer.load_state_dict(state)
    assert steps(longer, 20) == ahead and longer.stage == LATER[1]
    steps(longer, 60)
    assert longer.stage.begin == 9000


def _rest(stage: Stage) -> tuple[int, ConstantShares]:
    assert isinstance(stage.shares, ConstantShares)
    return stage.sequence_length, stage.shares


def test_expected_tokens_add_up_over_stages(corpora: list[Corpus]) -> None:
    mixture = staged(corpora)
    steps(mixture, 120)
    expected = mixture.expected_tokens(mixture.total)
    assert sum(expected) == pytest.approx(mixture.total)
    assert expected_tokens(mixture.stages, 0, 2000) == pytest.approx(500 + 250), "half of 1000, then a quarter of 1000"
    assert expected_tokens(mixture.stages, 1, 600) == pytest.approx(180), "stages that are not reached do not count"
