"""Whole runs whose ranks share packs: the same losses as without, exact resume, and what the run says about its plans."""

import shutil
from pathlib import Path

import pytest

from tests.distributed import RankError, RunRanks
from tests.train.test_trainer import CHECKPOINTS, drop_after, same_tensors
from tests.train.tiny_run import losses, master_weights, records, train, write_run

SHARED = {"planning__tokens_per_pack": 16}
"""Less than a document of 32 tokens, so that longer ones must be shared."""


@pytest.fixture(scope="module")
def alone(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of a run on one rank, in float64."""
    folder = tmp_path_factory.mktemp("alone")
    run_ranks(1, train, write_run(folder, train__dtype="float64"))
    return losses(folder / "run")


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, {"planning__policy": "static", "planning__degree": 2}),
        (4, {"planning__policy": "best_static"}),
        (4, {"planning__policy": "adaptive"}),
        (3, {"planning__policy": "adaptive", "planning__ahead": 0}),
        (4, {"planning__policy": "adaptive", "parallel__pp": 2}),
        (4, {"planning__policy": "adaptive", "parallel__tp": 2, "train__activation_checkpointing": "full"}),
    ],
    ids=["static2", "best_static", "adaptive", "adaptive-3-now", "adaptive-pp2", "adaptive-tp2"],
)
def test_losses_are_those_of_one_rank(
    run_ranks: RunRanks, tmp_path: Path, alone: dict[int, float], ranks: int, changes: dict[str, object]
) -> None:
    run_ranks(ranks, train, write_run(tmp_path, train__dtype="float64", **SHARED, **changes))
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-10, abs=0)
    steps = records(tmp_path / "run", "train")
    assert any(set(step["tokens_by_degree"]) - {"1"} for step in steps), "some documents were shared"
    before = [0, *(step["tokens"] for step in steps)]
    assert [sum(step["tokens_by_degree"].values()) for step in steps] == [
        step["tokens"] - b for step, b in zip(steps, before, strict=False)
    ]
    assert all(step["plan_seconds"] > 0 and step["plan_gap"] >= -1e-9 and step["planning_seconds"] > 0 for step in steps)
    assert all(step["exchange_seconds"] > 0 for step in steps if set(step["tokens_by_degree"]) - {"1"})
    for plan in records(tmp_path / "run", "plan"):
        assert max(pack[6] for pack in plan["packs"]) == pytest.approx(plan["seconds"]) and plan["seconds"] >= plan["bound"] * (1 - 1e-9)


def test_a_block_of_more_ranks_than_heads_goes_around_a_ring(run_ranks: RunRanks, tmp_path: Path) -> None:
    one_head = {"model__num_heads": 1, "model__num_kv_heads": 1, "train__dtype": "float64"}
    run_ranks(1, train, write_run(tmp_path / "alone", **one_head))
    run_ranks(2, train, write_run(tmp_path / "ring", planning__policy="adaptive", planning__largest_degree=2, **SHARED, **one_head))
    assert losses(tmp_path / "ring/run") == pytest.approx(losses(tmp_path / "alone/run"), rel=1e-10, abs=0)
    rings = [pack[2] for plan in records(tmp_path / "ring/run", "plan") for pack in plan["packs"]]
    assert max(rings) == 2 and all(step["exchange_seconds"] > 0 for step in records(tmp_path / "ring/run", "train"))


@pytest.mark.parametrize("sharding", ["zero1", "zero3"])
def test_zero_shares_packs_too(run_ranks: RunRanks, tmp_path: Path, sharding: str) -> None:
    run_ranks(1, train, write_run(tmp_path / "alone"))
    run_ranks(4, train, write_run(tmp_path / "shared", optimizer__sharding=sharding, planning__policy="adaptive", **SHARED))
    assert losses(tmp_path / "shared/run") == pytest.approx(losses(tmp_path / "alone/run"), rel=2e-5, abs=0)
    assert any(set(step["tokens_by_degree"]) - {"1"} for step in records(tmp_path / "shared/run", "train")), "some documents were shared"


def test_resume_is_bit_exact(run_ranks: RunRanks, tmp_path: Path) -> None:
    changes = {"planning__policy": "adaptive", "checkpoint__keep_last": 9, **SHARED}
    run_ranks(4, train, write_run(tmp_path / "whole", **changes))
    parted = write_run(tmp_path / "parted", **changes)
    shutil.copytree(tmp_path / "whole/run", tmp_path / "parted/run")
    drop_after(tmp_path / "parted", 3)
    run_ranks(4, train, parted)
    assert losses(tmp_path / "parted/run") == losses(tmp_path / "whole/run")
    assert same_tensors(*(master_weights(tmp_path / name / CHECKPOINTS / "step_00000008") for name in ("parted", "whole")))


def test_costs_are_corrected_at_checkpoints_and_kept_in_them(run_ranks: RunRanks, tmp_path: Path) -> None:
    config = write_run(tmp_path, planning__policy="adaptive", planning__correct=True, **SHARED)
    run_ranks(2, train, config, ["train.steps=6"])
    first = [event for event in records(tmp_path / "run", "event") if event["event"] == "cost_correction"]
    assert [event["step"] for event in first] == [3, 6]
    assert first[-1]["compute"] != 1.0, "this machine is not what was assumed"
    run_ranks(2, train, config)
    events = [event for event in records(tmp_path / "run", "event") if event["event"] == "cost_correction"]
    assert [event["step"] for event in events] == [3, 6, 8]
    predicted = {step["step"]: step["plan_seconds"] for step in records(tmp_path / "run", "train")}
    factors = {event["step"]: event["compute"] for event in events}
    assert predicted[7] / predicted[2] == pytest.approx(factors[6], rel=0.6), "step 7 was planned by the costs that step 6 saved"


def test_a_document_that_no_block_holds_is_named(run_ranks: RunRanks, tmp_path: Path) -> None:
    config = write_run(tmp_path, planning__policy="adaptive", planning__tokens_per_pack=15)
    with pytest.raises(RankError, match=r"(prose|code)\.bin, document \d+: 3[12] tokens; the largest block holds 30"):
        run_ranks(2, train, config)


def test_a_document_that_no_block_holds_is_cut_where_that_is_allowed(run_ranks: RunRanks, tmp_path: Path) -> None:
    config = write_run(tmp_path, planning__policy="adaptive", planning__tokens_per_pack=15, planning__split_long=True)
    run_ranks(2, train, config)
    alone = write_run(tmp_path / "alone", planning__tokens_per_pack=32)
    run_ranks(1, train, alone)
    cut, whole = losses(tmp_path / "run"), losses(tmp_path / "alone/run")
    assert len(cut) == 8 and cut[1] != whole[1], "parts do not see what came before"
    assert cut[1] == pytest.approx(whole[1], rel=0.05)
    taken = [step["tokens"] for step in records(tmp_path / "run", "train")]
    assert taken == [step["tokens"] for step in records(tmp_path / "alone/run", "train")], "nothing is lost at a cut"
    for plan, step in zip(records(tmp_path / "run", "plan"), records(tmp_path / "run", "train"), strict=True):
        assert plan["seconds"] == pytest.approx(step["plan_seconds"])


def test_plans_made_ahead_are_those_made_when_they_are_needed(run_ranks: RunRanks, tmp_path: Path) -> None:
    plans = []
    for ahead in (0, 3):
        run_ranks(2, train, write_run(tmp_path / str(ahead), planning__policy="adaptive", planning__ahead=ahead, **SHARED))
        plans.append([{**plan, "time": None} for plan in records(tmp_path / str(ahead) / "run", "plan")])
    assert plans[0] == plans[1] and len(plans[0]) == 8
