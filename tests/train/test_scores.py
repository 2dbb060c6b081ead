"""Labels that the model would have chosen are counted by group, and only inside ``watching``."""

import pytest
import torch

from megatron_ext.model.gpt import GPT
from megatron_ext.train.scores import ScoreSums
from tests.model.test_gpt import Pack, model_of


def add(scores: ScoreSums, model: GPT, pack: Pack, groups: torch.Tensor) -> None:
    scores.add(pack.loss(model)[1], pack.weight, groups)


def test_chosen_labels_are_counted_by_group() -> None:
    model, pack = model_of(), Pack([5, 1, 17, 2])
    groups = torch.arange(len(pack.tokens)) % 3
    pack.weight[::4] = 1.0
    chosen = pack.logits(model).argmax(1)
    pack.labels[::2] = chosen[::2]
    pack.weight[4] = 0.0
    scores = ScoreSums(model, 3)
    with scores.watching():
        add(scores, model, pack, groups)
    counts = (pack.labels == chosen) & (pack.weight > 0)
    assert scores.values[2].tolist() == [int((counts & (groups == group)).sum()) for group in range(3)]
    assert 10 <= scores.values[2].sum() < (pack.weight > 0).sum()
    assert model.observe_head is None
    with pytest.raises(AssertionError, match="inside watching"):
        add(scores, model, pack, groups)
