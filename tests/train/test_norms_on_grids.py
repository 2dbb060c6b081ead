"""Norms, their places and projections of embeddings: the same steps on every grid as in one process."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from megatron_ext.model.config import ModelConfig
from megatron_ext.model.norm_options import NormOptions
from megatron_ext.optim.sharded import ShardedOptimizer
from megatron_ext.parallel.world import World
from tests.distributed import RunRanks
from tests.train.test_grids import Case, check, config, largest_error, train_alone, train_on

__all__ = ["config"]
UNCLIPPED = 1e9

VARIANTS: dict[str, dict[str, Any]] = {
    "osp": {
        "qk_norm": False,
        "norm": NormOptions("ss", "peri", depth_scaling=True, embedding_norm=True),
        "embedding_projection": True,
        "embedding_gradient_shrink": 0.5,
    },
    "layer_mix": {"norm": NormOptions("layer", "mix", embedding_norm=True)},
}
"""With norms of queries, keys and what attention adds, the gain before attention would have hardly any gradient to compare."""


@dataclass(frozen=True)
class NormCase(Case):
    """A grid, and a key of ``VARIANTS``."""

    variant: str = "osp"

    @property
    def model(self) -> ModelConfig:
        return replace(super().model, **VARIANTS[self.variant])

    def __str__(self) -> str:
        return f"{self.variant}-{super().__str__()}"


@pytest.mark.parametrize(
    "case",
    [
        NormCase(ranks=2, recompute="full"),
        NormCase(tp=2, ranks=2),
        NormCase(tp=2, ranks=2, shard_tokens=True, recompute="selective"),
        NormCase(pp=2, ranks=2, layers=(2, 1), tied=True),
        NormCase(pp=2, tp=2, ranks=4, layers=(1, 2), tied=True, shard_tokens=True, variant="layer_mix"),
    ],
    ids=str,
)
def test_float64_steps_equal_one_process(run_ranks: RunRanks, config: str, case: NormCase) -> None:
    check(run_ranks, config, case, torch.float64, 1e-10)


def train_without_sums(world: World, config: str, case: NormCase) -> dict[str, Any]:
    """As ``train_on``, each rank keeping its part of gradients to itself."""
    with pytest.MonkeyPatch.context() as patch:
        for method in ("_sum_replicas", "check_replicas"):
            patch.setattr(ShardedOptimizer, method, lambda self: None)
        return train_on(world, config, case, torch.float64, UNCLIPPED)


def test_the_comparison_sees_every_gradient_that_ranks_have_in_part(run_ranks: RunRanks, config: str) -> None:
    """With tokens divided over the tensor-parallel ranks, those of norms and of projections of embeddings must be summed."""
    case = NormCase(tp=2, ranks=2, shard_tokens=True)
    expected = train_alone(case, torch.float64, UNCLIPPED)["gradients"]
    results = run_ranks(case.ranks, train_without_sums, config, case)
    wrong = {part[0] for result in results for part in result["gradients"] if largest_error([part], expected) > 1e-3}
    assert wrong == {name for name in expected if name.endswith(("norm.weight", "embed_projection.weight", "head_projection.weight"))}
