import pytest
import torch

from megatron_ext.errors import ConfigError
from megatron_ext.parallel.world import World, launched_ranks
from tests.distributed import RunRanks


def talk(world: World) -> dict[str, object]:
    world.barrier()
    return {
        "sum": world.sum(torch.tensor([world.rank + 1.0, 0.5], dtype=torch.float32)),
        "any": [world.any(False), world.any(world.rank == world.size - 1), world.any(True)],
        "gather": world.gather({"rank": world.rank, "text": "ü" * (10 * world.rank), "none": None}),
        "main": world.on_main([world.rank, "said"]),
        "is_main": world.is_main,
    }


@pytest.mark.parametrize("size", [1, 2])
def test_all_ranks_hear_the_same(run_ranks: RunRanks, size: int) -> None:
    for rank, heard in enumerate(run_ranks(size, talk)):
        assert torch.equal(heard["sum"], torch.tensor([size * (size + 1) / 2, size / 2], dtype=torch.float64))
        assert heard["any"] == [False, True, True]
        assert heard["gather"] == [{"rank": r, "text": "ü" * (10 * r), "none": None} for r in range(size)]
        assert heard["main"] == [0, "said"]
        assert heard["is_main"] == (rank == 0)


def hear(world: World, most: int) -> list[list[int]]:
    said = [[], [7], list(range(-3, 17)), [2**31 - 1] * 100]
    return [world.from_main(numbers if world.is_main else None, most) for numbers in said]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("most", [0, 1, 20, 1000])
def test_numbers_of_rank_0_reach_all_however_many(run_ranks: RunRanks, size: int, most: int) -> None:
    assert run_ranks(size, hear, most) == [[[], [7], list(range(-3, 17)), [2**31 - 1] * 100]] * size


def test_one_rank_needs_no_process_group() -> None:
    assert not torch.distributed.is_initialized()
    assert talk(World(0, 1, torch.device("cpu")))["gather"] == [{"rank": 0, "text": "", "none": None}]


@pytest.mark.parametrize(
    ("environment", "expected"), [({}, (0, 1)), ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)), ({"RANK": "2", "WORLD_SIZE": "3"}, (2, 3))]
)
def test_the_launcher_says_which_rank_this_is(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: tuple[int, int]
) -> None:
    _set(monkeypatch, environment)
    assert launched_ranks() == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "RANK=0 and WORLD_SIZE=None: a launcher sets both"),
        ({"WORLD_SIZE": "2"}, "RANK=None and WORLD_SIZE=2: a launcher sets both"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2 are not a rank of a world"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "are not a rank of a world"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "are not a rank of a world"),
    ],
)
def test_half_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str) -> None:
    _set(monkeypatch, environment)
    with pytest.raises(ConfigError, match=message):
        launched_ranks()


def _set(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
