import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.errors import DataError
from megatron_ext.report.metrics import read_run
from megatron_ext.report.records import PACK
from tests.report.fake_runs import plan, shared, start, train, write_run

PACKS = [[0, 4, 2, 9000, 3, 0.0, 0.5], [0, 1, 1, 700, 2, 0.5, 0.9], [1, 1, 1, 0, 0, 0.5, 0.5]]


def _without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", [start(), shared(1), plan(1, PACKS, in_rounds=True)]))
    (record,) = run.plans
    assert (record.step, record.devices, record.in_rounds, record.seconds, record.bound) == (1, 4, True, 0.9, 0.75 * 0.9)
    assert record.packs.dtype == PACK
    assert [list(pack) for pack in record.packs.tolist()] == PACKS
    assert record.work["tokens"].tolist() == [9000, 700]
    assert record.idle == pytest.approx(1 - (4 * 0.5 + 0.4) / (4 * 0.9))


def test_the_shares_of_a_step_are_of_its_seconds(tmp_path: Path) -> None:
    steps = [shared(1, exchange_seconds=0.5, plan_stall_seconds=0.1, step_seconds=2.0), shared(2, step_seconds=0.0), train(3)]
    first, second, third = read_run(write_run(tmp_path / "run", [start(), *steps])).train
    assert (first.exchange_share, first.stall_share) == (0.25, 0.05)
    assert all(map(math.isnan, (second.exchange_share, second.stall_share, third.exchange_share, third.stall_share)))
    assert (third.plan_policy, third.tokens_by_degree) == ("", {})


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (_without(plan(1, PACKS), "packs"), "plan record without 'packs'"),
        (_without(plan(1, PACKS), "devices"), "plan record without 'devices'"),
        (plan(1, PACKS) | {"packs": {"0": 1}}, "packs is {'0': 1}, expected a list"),
        (plan(1, PACKS, in_rounds=1), "in_rounds is 1, expected bool"),
        (plan(1, PACKS, devices="4"), "devices is '4', expected int"),
        (plan(1, PACKS, devices=2**70), "expected int"),
        (plan(1, [], devices=0), "devices 0"),
        (plan(1, PACKS, seconds=-1.0), "seconds -1.0"),
        (plan(1, PACKS, seconds=math.nan), "seconds nan"),
        (plan(1, PACKS, seconds=math.inf), "seconds inf"),
        (plan(1, PACKS, bound=-0.5), "bound -0.5"),
        (plan(1, PACKS, bound=math.inf), "bound inf"),
        (plan(1, PACKS, devices=2**40), "devices 1099511627776"),
        (
            plan(1, PACKS) | {"packs": [PACKS[0], [0, 1, 1, 700, 2, 0.5]]},
            "packs[1] is [0, 1, 1, 700, 2, 0.5], expected five numbers from 0 up and two",
        ),
        (plan(1, PACKS) | {"packs": [PACKS[0], 7]}, "packs[1] is 7"),
        (plan(1, [[0, 1, 1, -700, 2, 0.0, 0.5]]), "packs[0] is [0, 1, 1, -700"),
        (plan(1, [[0, 1, 1, 7.5, 2, 0.0, 0.5]]), "packs[0] is [0, 1, 1, 7.5"),
        (plan(1, [[0, True, 1, 700, 2, 0.0, 0.5]]), "packs[0] is [0, True"),
        (plan(1, [[0, 1, 1, 2**64, 2, 0.0, 0.5]]), "expected five numbers"),
        (plan(1, PACKS) | {"packs": [[0, 1, 1, 700, 2, 0.0, None]]}, "packs[0] is [0, 1, 1, 700, 2, 0.0, None]"),
        (plan(1, PACKS) | {"packs": [[0, 1, 1, 700, 2, 0.0, math.nan]]}, "packs[0] is [0, 1, 1, 700, 2, 0.0, nan]"),
        (plan(1, [[0, 3, 1, 700, 2, 0.0, 0.5]]), "a degree that is a power of two"),
        (plan(1, [[0, 0, 1, 700, 2, 0.0, 0.5]]), "a degree that is a power of two"),
        (plan(1, [[1, 4, 1, 700, 2, 0.0, 0.5]]), "ranks below 4"),
        (plan(1, [[0, 2, 4, 700, 2, 0.0, 0.5]]), "a ring that divides the degree"),
        (plan(1, [[0, 2, 0, 700, 2, 0.0, 0.5]]), "a ring that divides the degree"),
        (plan(1, [[0, 1, 1, 700, 2, 0.5, 0.25]], seconds=1.0), "an end after the begin"),
        (shared(1, tokens_by_degree={"3": 10}), "tokens_by_degree has a key that is not a power of two"),
        (shared(1, tokens_by_degree={"two": 10}), "tokens_by_degree has a key that is not a power of two"),
        (shared(1, tokens_by_degree={"2": -10}), "expected no negative number"),
        (shared(1, tokens_by_degree={"2": 1.5}), "tokens_by_degree.2 is 1.5"),
        (shared(1, tokens_by_degree=[1, 2]), "tokens_by_degree is [1, 2]"),
        (shared(1, plan_policy=None), "plan_policy is None, expected str"),
        (shared(1, plan_gap="small"), "plan_gap is 'small', expected float"),
        (shared(1, exchange_seconds=[0.1]), "exchange_seconds is [0.1], expected float"),
        (shared(1, plan_stall_seconds=10**400), "expected float"),
    ],
)
def test_a_malformed_record_of_plans_is_refused_with_file_and_line(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    directory = write_run(tmp_path / "run", [start(), train(1), json.dumps(record), train(2)])
    with pytest.raises(DataError) as caught:
        read_run(directory)
    assert str(caught.value).startswith(f"{directory / 'metrics.jsonl'}:3: not a record of metrics: ")
    assert reason in str(caught.value)


def test_after_a_resume_the_last_plan_of_a_step_counts(tmp_path: Path) -> None:
    first = [start(), *(plan(step, PACKS) for step in (1, 2, 3, 4))]
    resumed = [start(step=2), plan(3, PACKS[:1])]
    run = read_run(write_run(tmp_path / "run", [*first, *resumed]))
    assert [(record.step, len(record.packs)) for record in run.plans] == [(1, 3), (2, 3), (3, 1)]
