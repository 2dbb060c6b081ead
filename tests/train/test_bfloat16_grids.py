"""bfloat16 trainings on grids differ from one process no more than one process differs from itself when it packs differently."""

from pathlib import Path

import pytest

from tests.distributed import RunRanks
from tests.train.tiny_run import losses, train, write_run

STEPS = 20


def curve(run_ranks: RunRanks, folder: Path, ranks: int, *overrides: str) -> list[float]:
    run_ranks(ranks, train, write_run(folder, train__dtype="bfloat16", train__steps=STEPS), overrides)
    return list(losses(folder / "run").values())


def distance(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other) == STEPS
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5


@pytest.fixture(scope="module")
def alone(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], float]:
    """The losses of one process, and how far they move when the same documents are packed in two other ways."""
    folder = tmp_path_factory.mktemp("alone")
    first = curve(run_ranks, folder / "first", 1)
    others = [curve(run_ranks, folder / str(size), 1, f"planning.tokens_per_pack={size}") for size in (64, 128)]
    return first, max(distance(first, other) for other in others)


@pytest.mark.parametrize("keys", ["parallel.tp=2", "parallel.tp=2 parallel.sequence_parallel_activations=true", "parallel.pp=2"])
def test_a_grid_stays_within_the_spread(run_ranks: RunRanks, tmp_path: Path, alone: tuple[list[float], float], keys: str) -> None:
    first, spread = alone
    assert spread > 0, "bfloat16 rounds"
    assert distance(curve(run_ranks, tmp_path, 2, *keys.split()), first) < 1.5 * spread


def test_the_spread_tells_a_slightly_different_training(run_ranks: RunRanks, tmp_path: Path, alone: tuple[list[float], float]) -> None:
    first, spread = alone
    assert distance(curve(run_ranks, tmp_path, 1, "optimizer.lr=0.0101"), first) > 1.5 * spread
