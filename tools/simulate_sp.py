"""Simulate plans of sequence parallelism: seconds of a step under many policies, on the same documents. No device is used.

    python tools/simulate_sp.py --lengths wikipedia-like --devices 64 --hardware a100_40g --model 7b --json out.json --plot out.png

A planner plans with coarse coefficients; the judge adds what planners leave out (latencies, kernel tiles, uneven parts, ranks that meet in
every layer, changes of blocks), errs from them by --perturb, and counts memory in bytes. Seconds of steps are SIMULATED; seconds of
planning are measured here, on one processor. Planning is charged where it takes longer than a step, except under `planning free`.

  x bound (judge)     judged seconds over a lower bound, over all plans, of the judge's minorant: true coefficients without its additions
  x bound (planner)   seconds by the planner's own model over the lower bound of that model

Settings:
  rounds       ranks meet in every layer to gather parameters (ZeRO-3); a plan goes round by round
  borderless   every rank has all weights and float32 gradients, and owns a part of the optimizer's states; a block begins when it is free
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from simulate_sp_report import plan_record, summary, write_report
from simulate_sp_sensitivity import Base, Surface, cells, evaluate

from megatron_ext.errors import ConfigError, DataError, MegatronExtError
from megatron_ext.planning.bounds import lower_bound
from megatron_ext.planning.cost_model import CostModel
from megatron_ext.planning.lengths import length_distribution
from megatron_ext.planning.presets import Hardware, Model, cost_model, hardware, memory, model
from megatron_ext.planning.simulator import Machine, Simulation, draw_batches, planner_of

POPULATION = 1_000_000
"""Documents drawn of a distribution, to draw batches from."""
POLICIES = "adaptive,best_static,static:64,flexsp,megatron_dcp,bytescale,wlb"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", required=True, help="FILE.npz with an array `lengths`, wikipedia-like or github-like")
    parser.add_argument("--devices", type=int, default=64, help="data ranks (default: 64)")
    parser.add_argument("--hardware", default="a100_40g", help="a100_40g (published), a100_80g, h100 (assumed) or FILE.json")
    parser.add_argument("--model", default="7b", help="7b, 13b, 30b or FILE.json")
    parser.add_argument("--kv-heads", type=int, help="key/value heads of the model, if other than its own")
    parser.add_argument("--setting", choices=("rounds", "borderless"), default="rounds")
    parser.add_argument("--sharding", choices=("zero3", "owned"), help="default: zero3 in rounds, owned borderless")
    parser.add_argument("--policies", default=POLICIES, help=f"default: {POLICIES}")
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--documents", type=int, default=512, help="of a batch")
    parser.add_argument("--longest", type=int, default=393216, help="tokens; longer documents are left out")
    parser.add_argument(
        "--perturb", default="0.0", help="shares by which the truth differs from what planners believe, e.g. 0.0,0.1,0.2,0.4"
    )
    parser.add_argument("--milp-seconds", type=float, default=5.0, help="limit of each MILP of flexsp")
    parser.add_argument("--milp-tries", type=int, default=2, help="numbers of micro-batches that flexsp tries")
    parser.add_argument(
        "--bound", choices=("area", "lp"), default="area", help="method of the lower bounds; lp is tighter and takes seconds"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write every number here")
    parser.add_argument("--plot", help="write a picture of the first step here")
    parser.add_argument("--dump-plans", metavar="DIR", help="write every plan here, as JSON")
    parser.add_argument("--sensitivity", metavar="PNG", help="draw best static degree / adaptive over links, heads, memory and tails here")
    parser.add_argument("--sensitivity-batches", type=int, default=3, help="batches of each of its cells")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        simulate(arguments, console)
    except MegatronExtError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def simulate(arguments: argparse.Namespace, console: Console) -> None:
    check(arguments)
    rng = np.random.default_rng(arguments.seed)
    population = read_lengths(arguments.lengths, rng)
    machine = build_machine(arguments, console)
    policies = list(dict.fromkeys(arguments.policies.split(",")))
    planners = {name: planner_of(name, machine, arguments.milp_seconds, arguments.milp_tries) for name in policies}
    largest = machine.cost.capacity(machine.cost.degrees(arguments.devices)[-1])
    longest = min(arguments.longest, largest)
    batches, dropped = draw_batches(population, arguments.documents, arguments.batches, longest, rng)
    why = "what the largest block holds" if longest < arguments.longest else "--longest"
    console.print(
        f"{arguments.batches} batches of {arguments.documents} documents; {dropped:.4%} are longer than {longest} ({why}), left out"
    )
    simulation = Simulation(machine, planners, bound_of(machine, arguments.bound), perturbs_of(arguments.perturb), arguments.seed)
    with progress(console) as bar:
        task = bar.add_task("plans", total=len(batches) * len(planners))
        for number, planned in simulation.run(batches):
            if arguments.dump_plans and planned.plan:
                dump(Path(arguments.dump_plans), number, planned.policy, plan_record(planned.plan, batches[number]))
            bar.advance(task)
    for perturb in simulation.perturbs:
        console.print(table(simulation, perturb, arguments))
    for name in policies:
        refusals = [each.planned.refusal for each in simulation.of(name, simulation.perturbs[0]) if each.planned.refusal]
        if refusals:
            console.print(f"{name}: no plan for {len(refusals)} batches, counted as OOM: {refusals[0]}", markup=False)
    surface = draw_sensitivity(arguments, machine, population, console) if arguments.sensitivity else []
    if arguments.json:
        notes = {"longest": longest, "dropped": dropped}
        write_report(arguments.json, simulation, {**vars(arguments), **notes}, batches, [asdict(cell) for cell in surface])
    if arguments.plot:
        from simulate_sp_pictures import gantt

        gantt(arguments.plot, simulation, heading(arguments))


def check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for numbers that make no simulation."""
    for key in ("devices", "batches", "documents", "longest", "milp_tries", "sensitivity_batches"):
        if getattr(arguments, key) < 1:
            raise ConfigError(f"{key}: {getattr(arguments, key)}; accepted: at least 1")
    if arguments.setting == "borderless" and arguments.sharding == "zero3":
        raise ConfigError("sharding: 'zero3' with setting borderless; accepted: owned, because ranks that gather parameters need rounds")


def perturbs_of(text: str) -> list[float]:
    """Numbers from a list with commas."""
    try:
        return list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError as error:
        raise ConfigError(f"perturb: {text!r}; accepted: numbers of at least 0 and below 1 with commas between them") from error


def read_lengths(name: str, rng: np.random.Generator) -> NDArray[np.integer]:
    """Tokens of the documents to draw from."""
    if not name.endswith(".npz"):
        return length_distribution(name).sample(POPULATION, rng)
    try:
        with np.load(name, allow_pickle=False) as arrays:
            lengths = arrays["lengths"]
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{name}: {error}; accepted: an .npz file with an array `lengths`") from error
    if lengths.ndim != 1 or not np.issubdtype(lengths.dtype, np.integer) or not len(lengths) or lengths.min() < 1:
        raise DataError(f"{name}: lengths: {lengths.dtype} of shape {lengths.shape}; accepted: positive whole numbers in one dimension")
    return lengths


def presets(arguments: argparse.Namespace) -> tuple[Hardware, Model]:
    return hardware(arguments.hardware), model(arguments.model, arguments.kv_heads)


def build_machine(arguments: argparse.Namespace, console: Console) -> Machine:
    """What planners believe; says where the numbers come from."""
    machine, shape = presets(arguments)
    sharding = arguments.sharding or ("zero3" if arguments.setting == "rounds" else "owned")
    room = memory(machine, shape, arguments.devices, sharding)
    for name, words in (("hardware", machine.description), ("model", shape.description), ("memory", str(room))):
        console.print(f"{name:>9}: {words}", markup=False)
    cost = cost_model(machine, shape, arguments.devices, sharding)
    return Machine(arguments.devices, cost, room, arguments.setting == "rounds")


def bound_of(machine: Machine, method: Literal["area", "lp"]) -> Callable[[Sequence[int], CostModel], float]:
    """A lower bound of the seconds of a step, by lengths and cost model."""

    def bound(lengths: Sequence[int], cost: CostModel) -> float:
        return cost.per_step + lower_bound(lengths, machine.devices, cost, in_rounds=machine.in_rounds, method=method)

    return bound


def progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left:"))
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True)


def heading(arguments: argparse.Namespace) -> str:
    sharding = arguments.sharding or ("zero3" if arguments.setting == "rounds" else "owned")
    lengths = Path(arguments.lengths).stem
    return f"SIMULATED: {lengths}, {arguments.model} on {arguments.devices} x {arguments.hardware}, {arguments.setting}, {sharding}"


def table(simulation: Simulation, perturb: float, arguments: argparse.Namespace) -> Table:
    """One line a policy."""
    reference = "adaptive" if "adaptive" in simulation.planners else next(iter(simulation.planners))
    title = (
        heading(arguments) + f"\n{arguments.batches} batches of {arguments.documents}, truth off by {perturb:.0%}; means and 95 % intervals"
    )
    caption = "planning: ms, measured on one processor; in brackets what counts where a planner uses many; late: steps that waited for it"
    found = Table(title=title, caption=caption)
    for name in (
        "policy",
        "s / step",
        f"x {reference}",
        "planning free",
        "x bound (judge)",
        "x bound (planner)",
        "planning",
        "late",
        "idle",
        "exchange",
        "OOM",
    ):
        found.add_column(name, justify="left" if name == "policy" else "right", no_wrap=name == "policy")
    for row in summary(simulation, perturb, reference):
        ratios = [interval(row[key]) for key in ("to_reference", "to_bound_judge", "to_bound_planner")]
        free = row["to_reference_planning_free"]
        ratios.insert(1, f"{free['mean']:.3f}" if free["pairs"] else "-")
        planning = f"{row['planning_ms']:.0f}"
        if row["planning_ms"] > 1.01 * row["counted_planning_ms"] > 0:
            planning += f" ({row['counted_planning_ms']:.0f})"
        seconds, *shares = [
            "-" if row["oom"] == row["batches"] else form.format(row[key])
            for key, form in (("seconds", "{:.3f}"), ("idle", "{:.1%}"), ("exchange", "{:.1%}"))
        ]
        found.add_row(row["policy"], seconds, *ratios, planning, str(row["late"]), *shares, f"{row['oom']}/{row['batches']}")
    return found


def interval(ratio: dict[str, float]) -> str:
    return f"{ratio['mean']:.3f} ({ratio['low']:.3f}-{ratio['high']:.3f})" if ratio["pairs"] else "-"


def dump(folder: Path, batch: int, policy: str, record: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{batch:04d}_{policy.replace(':', '_')}.json").write_text(json.dumps(record) + "\n", "utf-8")


def draw_sensitivity(arguments: argparse.Namespace, machine: Machine, population: NDArray[np.integer], console: Console) -> list[Surface]:
    """Draw the best static degree over adaptive, and say what range it has."""
    from simulate_sp_pictures import surfaces

    base = Base(machine, population, arguments.documents, arguments.longest, arguments.sensitivity_batches, arguments.seed)
    with progress(console) as bar:
        found = [evaluate(base, cell) for cell in bar.track(cells(), description="sensitivity")]
    surfaces(arguments.sensitivity, found, heading(arguments))
    for name in ("best_fit", "balanced", "ratio"):
        ratios = [ratio for ratio in (getattr(each, name) for each in found) if ratio == ratio]
        words = {"best_fit": "best_static", "balanced": "wlb", "ratio": "better of both"}[name]
        loses = sum(ratio < 1 for ratio in ratios)
        console.print(f"{words} / adaptive: {min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} cells; adaptive loses in {loses}")
    return found


if __name__ == "__main__":
    sys.exit(main())
