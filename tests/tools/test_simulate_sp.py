"""The simulator of sequence-parallel plans, from its command line to its files."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.planning import CostModel, Pack, Plan, Slice
from megatron_ext.planning.presets import Memory
from megatron_ext.planning.simulator import Machine, Simulation, draw_batches, paired, planner_of

TOOL = Path(__file__).parents[2] / "tools" / "simulate_sp.py"
PEERS = "megatron_dcp,bytescale,wlb,wlb:2,flexsp"


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, env=environment, timeout=240)


@pytest.fixture(scope="module")
def lengths_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("lengths") / "drawn.npz"
    np.savez(path, lengths=np.random.default_rng(0).integers(10, 20_000, 500).astype(np.int32))
    return str(path)


@pytest.mark.parametrize("setting", ["rounds", "borderless"])
def test_from_end_to_end(tmp_path: Path, lengths_file: str, setting: str) -> None:
    words = (
        f"--devices 8 --hardware h100 --setting {setting} --batches 2 --documents 24 --milp-seconds 0.1 --milp-tries 1 --perturb 0.0,0.2"
    )
    files = {name: str(tmp_path / name) for name in ("out.json", "out.png", "plans")}
    done = run_tool(
        *("--lengths", lengths_file, "--policies", PEERS, *words.split()),
        *("--json", files["out.json"], "--plot", files["out.png"], "--dump-plans", files["plans"]),
    )
    assert done.returncode == 0, done.stderr
    assert "SIMULATED" in done.stdout and "assumed, not measured" in done.stdout and "truth off by 20%" in done.stdout
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "out.json").read_text())
    check_report(report, setting)
    plans = sorted((tmp_path / "plans").iterdir())
    assert len(plans) == sum(not result["refusal"] for result in report["results"] if result["perturb"] == 0)
    tokens = report["machine"]["cost"]["tokens_per_rank"]
    for path in plans:
        plan, lengths = read_plan(path)
        plan.validate(lengths, tokens)
        assert plan.in_rounds == (setting == "rounds")
        with pytest.raises(ConfigError):
            plan.validate([length + 1 for length in lengths], tokens)


def test_sensitivity_has_every_cell_and_says_where_adaptive_loses(tmp_path: Path, lengths_file: str) -> None:
    words = "--devices 8 --hardware h100 --batches 1 --documents 12 --policies adaptive --sensitivity-batches 1"
    picture, numbers = tmp_path / "surface.png", tmp_path / "out.json"
    done = run_tool("--lengths", lengths_file, *words.split(), "--sensitivity", str(picture), "--json", str(numbers))
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG") and "adaptive loses in" in done.stdout
    cells = json.loads(numbers.read_text())["sensitivity"]
    assert len({tuple(each["cell"].values()) for each in cells}) == len(cells) == 6 * 3 * 4 * 3
    assert all(0 < each["ratio"] <= min(each["best_fit"], each["balanced"]) * (1 + 1e-9) for each in cells)


def check_report(report: dict, setting: str) -> None:
    assert set(report) == {"kind", "units", "bounds", "settings", "versions", "machine", "steps", "summary", "results", "sensitivity"}
    assert report["kind"] == "SIMULATED" and report["machine"]["in_rounds"] == (setting == "rounds")
    policies = PEERS.split(",")
    assert len(report["results"]) == 2 * 2 * len(policies) and len(report["summary"]) == 2 * len(policies)
    assert [step["documents"] for step in report["steps"]] == [24, 24]
    # With weights and gradients on every rank, two ranks do not hold the longest documents.
    refused = [result for result in report["results"] if result["refusal"]]
    assert {result["policy"] for result in refused} == (set() if setting == "rounds" else {"wlb:2"})
    assert all(result["seconds"] is None for result in refused)
    for result in report["results"]:
        if result["refusal"]:
            continue
        assert result["seconds_without_planning"] >= result["bound_judge"] * (1 - 1e-9)
        assert result["planner_seconds"] >= result["bound_planner"] * (1 - 1e-9)
        assert result["oom_packs"] == [] and result["peak_bytes"] <= report["machine"]["memory"]["limit"]
    for row in report["summary"]:
        assert row["oom"] == sum(each["policy"] == row["policy"] and each["perturb"] == row["perturb"] for each in refused)
        assert row["batches"] == 2 == row["to_reference"]["pairs"] + row["oom"]
        if not row["to_bound_judge"]["pairs"]:
            continue
        assert row["to_bound_judge"]["low"] <= row["to_bound_judge"]["mean"] <= row["to_bound_judge"]["high"]


def read_plan(path: Path) -> tuple[Plan, list[int]]:
    found = json.loads(path.read_text())
    packs = [
        Pack(pack["first_rank"], pack["degree"], tuple(Slice(*part) for part in pack["documents"]), pack["ring"]) for pack in found["packs"]
    ]
    return Plan(found["devices"], tuple(packs), found["in_rounds"]), found["lengths"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--lengths wiki", "lengths: 'wiki'; accepted: wikipedia-like, github-like"),
        ("--lengths none.npz", "none.npz"),
        ("--lengths wikipedia-like --policies guess", "policies: 'guess'; accepted: adaptive"),
        ("--lengths wikipedia-like --policies static", "static:DEGREE"),
        ("--lengths wikipedia-like --policies flexsp:8", "policies: 'flexsp:8'"),
        ("--lengths wikipedia-like --policies wlb:3 --devices 8 --batches 1", "degree: 3; accepted: 1, 2, 4, 8"),
        ("--lengths wikipedia-like --setting borderless", "states below 30.0 GiB"),
        ("--lengths wikipedia-like --setting borderless --sharding zero3", "sharding: 'zero3' with setting borderless"),
        ("--lengths wikipedia-like --perturb 1.5 --policies wlb", "perturb: 1.5"),
        ("--lengths wikipedia-like --perturb much --policies wlb", "perturb: 'much'"),
        ("--lengths wikipedia-like --batches 0", "batches: 0; accepted: at least 1"),
        ("--lengths wikipedia-like --hardware v100", "hardware: 'v100'; accepted: a100_40g"),
    ],
)
def test_what_cannot_be_simulated_is_refused(arguments: str, message: str) -> None:
    done = run_tool(*arguments.split())
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def one_rank_each(lengths: Sequence[int]) -> tuple[Plan, float | None]:
    return Plan(2, tuple(Pack(d % 2, 1, (Slice(d, 0, length),)) for d, length in enumerate(lengths))).by_rounds(1), None


def all_on_one(lengths: Sequence[int]) -> tuple[Plan, float | None]:
    return Plan(2, (Pack(0, 1, tuple(Slice(d, 0, length) for d, length in enumerate(lengths))),)).by_rounds(1), None


def slowly(lengths: Sequence[int]) -> tuple[Plan, float | None]:
    return one_rank_each(lengths)[0], 1e6


def only_short(lengths: Sequence[int]) -> tuple[Plan, float | None]:
    if max(lengths) > 25:
        raise ConfigError("document 0 has too many tokens")
    return one_rank_each(lengths)


def stub_simulation() -> Simulation:
    machine = Machine(2, CostModel(100), Memory(0.0, 1.0, 100.0), in_rounds=True)
    planners = {"each": one_rank_each, "one": all_on_one, "slow": slowly, "short": only_short}
    simulation = Simulation(machine, planners, lambda lengths, cost: sum(lengths) / 2)
    assert len(list(simulation.run([[60, 60], [20, 20]]))) == 8
    return simulation


def test_plans_that_do_not_fit_are_counted_and_never_dropped() -> None:
    simulation = stub_simulation()
    assert [each.fits for each in simulation.of("one", 0.0)] == [False, True]
    assert simulation.of("one", 0.0)[0].seconds == float("inf")
    ratio = simulation.beside("one", "each", 0.0)
    assert ratio.pairs == 1 and ratio.mean == pytest.approx(2.0, rel=0.1)
    refused, planned = simulation.of("short", 0.0)
    assert not refused.fits and refused.planned.refusal == "document 0 has too many tokens" and refused.seconds == float("inf")
    assert planned.fits and simulation.above_bound("short", 0.0).pairs == 1


def test_planning_delays_only_where_it_takes_longer_than_a_step() -> None:
    simulation = stub_simulation()
    assert [each.seconds for each in simulation.of("slow", 0.0)] == [1e6, 1e6]
    assert all(each.delayed for each in simulation.of("slow", 0.0))
    assert simulation.beside("slow", "each", 0.0).mean > 1e3
    assert simulation.beside("slow", "each", 0.0, charged=False).mean == 1.0
    fast = simulation.of("each", 0.0)[0]
    assert not fast.delayed and fast.seconds == fast.verdict.seconds


def test_a_bootstrap_interval_holds_the_mean_and_narrows() -> None:
    rng = np.random.default_rng(0)
    few, many = paired(rng.normal(2.0, 0.1, 10), 0), paired(rng.normal(2.0, 0.1, 1000), 0)
    assert few.low < few.mean < few.high and many.low < 2.0 < many.high
    assert many.high - many.low == pytest.approx(2 * 1.96 * 0.1 / 1000**0.5, rel=0.1)
    assert paired([], 0).pairs == 0 and np.isnan(paired([], 0).mean)


def test_batches_leave_out_longer_documents_and_say_how_many() -> None:
    batches, dropped = draw_batches(np.array([5, 6, 7, 100]), 50, 3, 10, np.random.default_rng(0))
    assert dropped == 0.25 and len(batches) == 3 and all(len(batch) == 50 and max(batch) <= 7 for batch in batches)
    with pytest.raises(ConfigError, match="longest: 4; accepted: at least 5"):
        draw_batches(np.array([5]), 1, 1, 4, np.random.default_rng(0))


def test_a_policy_that_cannot_plan_at_all_is_refused_before_anything_is_simulated() -> None:
    machine = Machine(2, CostModel(100), Memory(0.0, 1.0, 100.0), in_rounds=True)
    simulation = Simulation(machine, {"wlb:64": planner_of("wlb:64", machine)}, lambda lengths, cost: 1.0)
    with pytest.raises(ConfigError, match="degree: 64; accepted: 1"):
        next(simulation.run([[5]]))
