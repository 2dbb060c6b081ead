"""What simulate_sp.py writes: a summary of each policy, every number as JSON, and plans as JSON."""

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

import megatron_ext
from megatron_ext.atomic_io import write_json
from megatron_ext.planning.plan import Plan
from megatron_ext.planning.simulator import Judged, Simulation


def summary(simulation: Simulation, perturb: float, reference: str) -> list[dict[str, Any]]:
    """For each policy, means over the batches; of those whose plans fit in memory where they are of time."""
    rows = []
    for policy in simulation.planners:
        results = simulation.of(policy, perturb)
        fitting = [each for each in results if each.fits]
        rows.append(
            {
                "policy": policy,
                "perturb": perturb,
                "batches": len(results),
                "oom": len(results) - len(fitting),
                "late": sum(each.delayed for each in fitting),
                "seconds": mean([each.seconds for each in fitting]),
                "reference": reference,
                "to_reference": asdict(simulation.beside(policy, reference, perturb)),
                "to_reference_planning_free": asdict(simulation.beside(policy, reference, perturb, charged=False)),
                "to_bound_judge": asdict(simulation.above_bound(policy, perturb)),
                "to_bound_planner": asdict(simulation.above_believed_bound(policy, perturb)),
                "planning_ms": 1e3 * mean([each.planned.planning_seconds for each in results]),
                "counted_planning_ms": 1e3 * mean([each.planned.counted_seconds for each in results]),
                "idle": mean([each.verdict.idle for each in fitting if each.verdict]),
                "exchange": mean([each.verdict.exchange for each in fitting if each.verdict]),
            }
        )
    return rows


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def write_report(
    path: str,
    simulation: Simulation,
    settings: Mapping[str, Any],
    batches: Sequence[Sequence[int]],
    sensitivity: Sequence[Mapping[str, Any]],
) -> None:
    """Settings, versions, coefficients, and every result of every batch. Numbers that do not exist are null."""
    reference = "adaptive" if "adaptive" in simulation.planners else next(iter(simulation.planners))
    machine = simulation.machine
    report = {
        "kind": "SIMULATED",
        "units": "seconds, bytes and tokens; planning is measured on one processor, all other seconds are simulated",
        "bounds": {
            "judge": "lower bound, over all plans, of the judge's minorant: its true coefficients without latencies, tiles, uneven parts, "
            "meetings and changes of blocks",
            "planner": "lower bound of the planner's own cost model",
        },
        "settings": dict(settings),
        "versions": versions(),
        "machine": {
            "devices": machine.devices,
            "in_rounds": machine.in_rounds,
            "cost": asdict(machine.cost),
            "memory": asdict(machine.memory),
        },
        "steps": [{"documents": len(each), "tokens": sum(each), "longest": max(each)} for each in batches],
        "summary": [row for perturb in simulation.perturbs for row in summary(simulation, perturb, reference)],
        "sensitivity": [dict(each) for each in sensitivity],
        "results": [record(each) for each in simulation.results],
    }
    write_json(path, without_nan(report))


def record(result: Judged) -> dict[str, Any]:
    planned, verdict = result.planned, result.verdict
    return {
        "batch": result.batch,
        "policy": planned.policy,
        "perturb": result.perturb,
        "seconds": result.seconds,
        "seconds_without_planning": verdict.seconds if verdict else None,
        "late": result.delayed,
        "refusal": planned.refusal,
        "oom_packs": list(verdict.oom) if verdict else None,
        "peak_bytes": verdict.peak_bytes if verdict else None,
        "idle": verdict.idle if verdict else None,
        "exchange": verdict.exchange if verdict else None,
        "switches": verdict.switches if verdict else None,
        "bound_judge": result.bound,
        "planner_seconds": planned.believed_seconds,
        "bound_planner": result.believed_bound,
        "planning_seconds": planned.planning_seconds,
        "counted_planning_seconds": planned.counted_seconds,
        "packs": sum(1 for pack in planned.plan.packs if pack.slices) if planned.plan else None,
    }


def plan_record(plan: Plan, lengths: Sequence[int]) -> dict[str, Any]:
    """A plan and its documents as JSON."""
    packs = [
        {
            "first_rank": pack.first_rank,
            "degree": pack.degree,
            "ring": pack.ring,
            "documents": [[part.document, part.start, part.stop] for part in pack.slices],
        }
        for pack in plan.packs
    ]
    return {"lengths": list(map(int, lengths)), "devices": plan.num_ranks, "in_rounds": plan.in_rounds, "packs": packs}


def versions() -> dict[str, str]:
    found = {"megatron_ext": megatron_ext.__version__, "python": platform.python_version(), "machine": platform.machine()}
    for package in ("numpy", "numba", "highspy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def without_nan(value: Any) -> Any:
    """``value`` with null in place of numbers that JSON has no word for."""
    match value:
        case dict():
            return {key: without_nan(each) for key, each in value.items()}
        case list() | tuple():
            return [without_nan(each) for each in value]
        case float() if not math.isfinite(value):
            return None
    return value
