"""Needles are where they should be, once, and the same in every run."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_ext.data.batch import read_pack
from megatron_ext.data.needle import Haystack, Needle, needle_pieces
from megatron_ext.errors import DataError
from megatron_ext.planning import Pack
from megatron_ext.planning.plan import Slice


def haystack(tokens: int = 500, vocabulary: int = 60) -> Haystack:
    text = np.random.default_rng(1).integers(3, 3 + vocabulary, tokens)
    return Haystack(text, np.unique(text), "text")


NEEDLE = Needle(haystack(), 200, 0.25, 0, key_tokens=3, value_tokens=2, seed=5)


def whole(needle: Needle) -> np.ndarray:
    return needle.tokens(0, 0, needle.length)


@pytest.mark.parametrize("length", [10, 11, 200, 1500])
@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_the_needle_lies_at_its_depth_and_is_asked_for_at_the_end(length: int, depth: float) -> None:
    needle = replace(NEEDLE, length=length, depth=depth)
    document, words = whole(needle), 5
    assert len(document) == length
    before = round(depth * (length - 2 * words))
    np.testing.assert_array_equal(document[before : before + words], document[-words:])
    assert len(set(document[-words:].tolist())) == words and set(document.tolist()) <= set(needle.haystack.vocabulary.tolist())
    key = document[-words:-2].tolist()
    assert sum(document[i : i + 3].tolist() == key for i in range(length - 2)) == 2
    text = np.concatenate([document[:before], document[before + words : -words]])
    doubled = np.tile(needle.haystack.tokens, 5).tolist()
    assert any(doubled[i : i + len(text)] == text.tolist() for i in range(500)), "the text goes round the corpus"


def test_a_needle_is_a_function_of_its_fields() -> None:
    np.testing.assert_array_equal(whole(NEEDLE), whole(replace(NEEDLE)))
    for other in ({"number": 1}, {"seed": 6}, {"depth": 0.5}, {"length": 201}):
        assert whole(replace(NEEDLE, **other))[:199].tolist() != whole(NEEDLE)[:199].tolist()


def test_a_pack_reads_needles_and_weights_begin_at_the_answer() -> None:
    needles = [NEEDLE, replace(NEEDLE, length=50, number=3)]
    pieces = needle_pieces(needles)
    assert [len(piece) for piece in pieces] == [199, 49]
    batch = read_pack(Pack(0, 1, (Slice(1, 0, 49), Slice(0, 0, 199))), pieces, needles, 100)
    assert batch.loss_weight.tolist() == [1.0] * 248 and batch.sources.tolist() == [1] * 49 + [0] * 199
    for number, labels in ((1, batch.labels[:49]), (0, batch.labels[49:])):
        first = needles[number].first_answer
        assert labels[first:].tolist() == whole(needles[number])[-2:].tolist()


def test_poor_text_is_refused() -> None:
    poor = Haystack(np.array([1, 2, 3, 1]), np.array([1, 2, 3]), "folder/text")
    with pytest.raises(DataError, match=r"folder/text.bin has 3 different tokens for validation; a key and its value need 5"):
        poor.check(5)
    poor.check(3)
    with pytest.raises(DataError, match="100 random keys of 1 tokens all occur in 194 tokens of text"):
        whole(replace(NEEDLE, haystack=haystack(5000, 6), key_tokens=1))
