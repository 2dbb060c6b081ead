import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.report.metrics import Run, read_run
from megatron_ext.report.plans import Sharing, sharing
from megatron_ext.report.summary import arrange
from tests.report.fake_runs import plan, shared, start, train, write_run

ADAPTIVE = {"planning": {"policy": "adaptive"}}


def _run(directory: Path, records: list[dict[str, Any]], config: Any = None) -> Run:
    return read_run(write_run(directory, [start(), *records], config=config))


def _sharing(directory: Path, records: list[dict[str, Any]], config: Any = None) -> Sharing | None:
    return sharing(arrange([_run(directory, records, config)]))


def test_the_numbers_are_those_of_the_records(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    gaps, exchanges, stalls = random.uniform(0, 0.1, 7), random.uniform(0, 0.5, 7), random.uniform(0, 0.01, 7)
    policies = ["adaptive", "best_static", "adaptive", "adaptive", "best_static", "adaptive", "best_static"]
    steps = [
        shared(
            i + 1, plan_gap=gaps[i], exchange_seconds=exchanges[i], plan_stall_seconds=stalls[i], plan_policy=policies[i], step_seconds=2.0
        )
        for i in range(7)
    ]
    found = _sharing(tmp_path / "run", steps, ADAPTIVE)
    assert found.policies == ("adaptive",)
    assert found.median_gap == pytest.approx(np.median(gaps))
    assert found.median_exchange_share == pytest.approx(np.median(exchanges) / 2.0)
    assert (found.adaptive_steps, found.fallback_steps) == (7, policies.count("best_static"))
    assert found.stall_seconds == pytest.approx(stalls.sum())
    assert found.tokens_by_degree == {1: 7 * 2048, 4: 7 * 6144}
    assert found.facts == {
        "Planning policy": "adaptive",
        "Median gap to the bound": f"{100 * np.median(gaps):.1f} %",
        "Median share of exchanges": f"{50 * np.median(exchanges):.1f} %",
        "Steps planned by fallback": "3 of 7",
        "Waited for plans": f"{1e3 * stalls.sum():.3g} ms",
    }


@pytest.mark.parametrize(
    ("records", "present"),
    [
        ([train(1)], False),
        ([shared(1, plan_policy="data_parallel", tokens_by_degree={"1": 8192})], False),
        ([shared(1, plan_policy="data_parallel", tokens_by_degree={"1": 8192, "2": 0}), plan(1, [[0, 1, 1, 8192, 9, 0.0, 1.0]])], False),
        ([shared(1, plan_policy="static", tokens_by_degree={"1": 8192})], True),
        ([shared(1, plan_policy="data_parallel", tokens_by_degree={"1": 8192, "2": 10})], True),
        ([train(1, tokens_by_degree={"2": 8192})], True),
        ([train(1), plan(1, [[0, 2, 1, 8192, 9, 0.0, 1.0]])], True),
        ([train(1), plan(1, [[0, 2, 1, 0, 0, 0.0, 0.0]])], False),
    ],
)
def test_there_is_something_to_say_only_where_ranks_may_share(tmp_path: Path, records: list[dict[str, Any]], present: bool) -> None:
    assert (_sharing(tmp_path / "run", records) is not None) == present


def test_a_control_run_does_not_count(tmp_path: Path) -> None:
    alone, together = _run(tmp_path / "a", [train(1)]), _run(tmp_path / "b", [shared(1)])
    assert sharing(arrange([alone], {"control": together})) is None
    assert sharing(arrange([together], {"control": alone})) is not None


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    found = _sharing(tmp_path / "run", [train(1, tokens_by_degree={"2": 8192})], {"planning": "?"})
    assert math.isnan(found.median_gap) and math.isnan(found.median_exchange_share) and math.isnan(found.stall_seconds)
    assert found.facts == {}
    unmeasured = _sharing(
        tmp_path / "zeros", [shared(1, plan_policy="static", exchange_seconds=0.0, plan_gap=0.0)], {"planning": {"policy": "static"}}
    )
    assert unmeasured.facts == {"Planning policy": "static", "Waited for plans": "1 ms"}


def test_steps_of_old_versions_do_not_enter_medians(tmp_path: Path) -> None:
    found = _sharing(tmp_path / "run", [train(1), train(2), train(3), shared(4, plan_gap=0.5), shared(5, plan_gap=0.25)], ADAPTIVE)
    assert found.median_gap == 0.375
    assert (found.adaptive_steps, found.fallback_steps) == (2, 0)


def test_best_static_is_a_fallback_only_while_the_run_was_adaptive(tmp_path: Path) -> None:
    static = [shared(step, plan_policy="best_static") for step in (1, 2, 3)]
    adaptive = [start(step=3), shared(4), shared(5, plan_policy="best_static")]
    run = read_run(write_run(tmp_path / "run", [start(), *static, *adaptive], config=ADAPTIVE))
    found = sharing(arrange([run]))
    assert (found.adaptive_steps, found.fallback_steps) == (2, 1)
    never = _sharing(tmp_path / "never", static, {"planning": {"policy": "best_static"}})
    assert (never.adaptive_steps, never.policies) == (0, ("best_static",))
    always = _sharing(tmp_path / "always", static, ADAPTIVE)
    assert (always.adaptive_steps, always.fallback_steps) == (3, 3)


def test_policies_of_several_phases_are_named_in_order(tmp_path: Path) -> None:
    runs = [_run(tmp_path / "a", [shared(1, plan_policy="static")]), _run(tmp_path / "b", [shared(1, plan_policy="best_static")], ADAPTIVE)]
    found = sharing(arrange([*runs, runs[1]]))
    assert found.policies == ("static", "adaptive")
    assert found.facts["Planning policy"] == "static, adaptive"
    assert (found.adaptive_steps, found.fallback_steps) == (2, 2)
