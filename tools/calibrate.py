#!/usr/bin/env python3
"""Measure what packs cost on this machine, for plans that follow it: name the file in ``planning.cost_model`` of the run.

    deepspeed [--hostfile HOSTS] tools/calibrate.py --config CONFIG.yaml --output costs.json [key=value ...]

Start it as the run will be started, on as many ranks: model, dtype, attention, activation checkpointing, grid and tokens per pack are
those of the configuration. Without a launcher it measures one rank, and so no exchanges.
"""

import argparse
import os
import platform
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from megatron_ext.atomic_io import write_json
from megatron_ext.config import RunConfig, load_config
from megatron_ext.errors import ConfigError, MegatronExtError
from megatron_ext.parallel.device import choose_dtype, describe, local_device
from megatron_ext.parallel.grid import Grid, GridShape, grid_shape
from megatron_ext.parallel.heartbeat import Heartbeat
from megatron_ext.parallel.world import join_world, launched_ranks
from megatron_ext.planning.cost_file import cost_to_json
from megatron_ext.planning.cost_model import CostModel, Curve
from megatron_ext.report.formats import duration
from megatron_ext.train.build import Setup, build_grid, prepare
from megatron_ext.train.calibration import Calibration, calibrate
from megatron_ext.train.memory import largest_rank

GIB = 2**30
SECONDS_BETWEEN_LINES = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; the result is its exit status: 0, or 2 after an error of the input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of which the median counts, after one to warm up (default: 5)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, as of the run")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    options = parser.parse_args(arguments)
    try:
        if options.rounds < 1:
            raise ConfigError(f"--rounds is {options.rounds}; accepted: a number, at least 1")
        run(load_config(options.config, options.overrides), options.output, options.rounds)
    except MegatronExtError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def run(config: RunConfig, output: Path, rounds: int) -> None:
    """Calibrate on the ranks that the launcher started, or in this process alone, and write ``output``.

    Raises:
        ConfigError, DataError: before any process group exists.
        ConfigError: ``output`` cannot be written, or a pack does not fit in memory.
    """
    setup = prepare(config)
    shape = grid_shape(config.parallel, launched_ranks()[1])
    refuse_what_memory_cannot_hold(setup, shape)
    world = join_world(config.train.threads_per_rank)
    obstacle = world.on_main(why_not_writable(output) if world.is_main else None)
    if obstacle:
        raise ConfigError(f"--output is {str(output)!r}: {obstacle}; accepted: a file in a directory that rank 0 can write to")
    heartbeat = Heartbeat(world, config.train.heartbeat_timeout)
    try:
        grid = build_grid(setup, world)
        with showing_progress(world.is_main) as progress, telling_memory_errors(setup, shape):
            result = calibrate(setup, grid, rounds, progress)
        hosts = len(set(world.gather(socket.gethostname())))
        if world.is_main:
            write_json(output, {"about": about(setup, grid, result, hosts), **cost_to_json(result.cost)})
            show(result, grid, output)
        heartbeat.close()
    except BaseException as error:
        heartbeat.fail(error)
        raise
    dist.destroy_process_group()


def about(setup: Setup, grid: Grid, result: Calibration, hosts: int) -> dict[str, Any]:
    """What was measured, and where, for people: no date and no name of a host."""
    options = setup.config
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": describe(grid.world.device),
        "torch": torch.__version__,
        "hosts": hosts,
        "ranks": grid.world.size,
        "grid": str(grid.shape),
        "parameters": setup.model.num_parameters(),
        "dtype": result.chosen["dtype"],
        "attention": result.chosen["attention"],
        "activation_checkpointing": options.train.activation_checkpointing,
        "sharding": options.optimizer.sharding,
        "fit": {"r_squared": result.fit.r_squared, "largest_relative_error": result.fit.worst},
        "relative_errors": {check.name: check.error for check in result.checks},
    }


def show(result: Calibration, grid: Grid, output: Path) -> None:
    """Print the coefficients with their units, how well they fit, and what is missing."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    table = Table("coefficient", "measured", "what it is")
    for row in rows(result.cost):
        table.add_row(*row)
    console.print(f"{grid.shape}, {describe(grid.world.device)}, {result.chosen['dtype']}, attention {result.chosen['attention']}", table)
    console.print(f"fit to packs: R^2 {result.fit.r_squared:.4f}, largest relative error {result.fit.worst:.1%}")
    checks = Table("packs that were not in the fit", "predicted", "measured", "error")
    for check in result.checks:
        checks.add_row(check.name, f"{1e3 * check.predicted:.4g} ms", f"{1e3 * check.measured:.4g} ms", f"{check.error:+.1%}")
    console.print(checks)
    if grid.shape.dp == 1:
        console.print(
            "missing: all_to_all and ring_step, because there is 1 data rank: plans would take exchanges to be free; start this with the "
            "ranks that will train"
        )
    console.print(f"wrote {output}; name it in planning.cost_model")


def rows(cost: CostModel) -> Iterator[tuple[str, str, str]]:
    """(name, value with unit, meaning) of what was measured."""
    yield "per_token", f"{1e6 * cost.per_token:.4g} us", "forward and backward of a token"
    yield "per_token_squared", f"{1e9 * cost.per_token_squared:.4g} ns", "of a squared token of a document"
    yield "per_pack", f"{1e3 * cost.per_pack:.4g} ms", "of a pack besides"
    yield "per_step", f"{1e3 * cost.per_step:.4g} ms", "a step without packs: gradients and update"
    rates = ", ".join(f"{tokens:.0f}: {rate:.0%}" for tokens, rate in zip(cost.efficiency_tokens, cost.efficiency, strict=True))
    yield "efficiency", rates, "speed of attention by tokens of a document"
    for number, curve in enumerate(cost.all_to_all):
        yield f"all_to_all of {2 << number}", points(curve), "by bytes that a rank sends"
    if cost.ring_step.bytes:
        yield "ring_step", points(cost.ring_step), "by bytes that a rank sends"


def points(curve: Curve) -> str:
    """First and last point of a curve."""
    first, last = (f"{curve.bytes[at] / 1024:.4g} KiB {1e3 * curve.seconds[at]:.3g} ms" for at in (0, -1))
    return f"{first} ... {last} ({curve.bytes[-1] / curve.seconds[-1] / 1e9:.3g} GB/s)"


def why_not_writable(output: Path) -> str | None:
    """Why no file can be put there; None if one can."""
    if output.is_dir():
        return "a directory"
    try:
        with tempfile.TemporaryFile(dir=output.parent):
            return None
    except OSError as error:
        return f"{error.strerror} in {str(output.parent)!r}"


def refuse_what_memory_cannot_hold(setup: Setup, shape: GridShape) -> None:
    """Raises ConfigError where ranks on CPUs need more than the memory of the machine: it would not fail but swap, or be killed."""
    device = local_device()
    local = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if device.type == "cpu" and local * needed_bytes(setup, shape) > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise too_large(setup, shape)


@contextmanager
def telling_memory_errors(setup: Setup, shape: GridShape) -> Iterator[None]:
    """Turns running out of memory into a ConfigError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        out = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not out:
            raise
        raise too_large(setup, shape) from error


def too_large(setup: Setup, shape: GridShape) -> ConfigError:
    """The error of a model or pack that a rank cannot hold."""
    return ConfigError(
        f"planning.tokens_per_pack is {setup.tokens_per_pack}: with packs of so many tokens a rank of {shape} needs about "
        f"{needed_bytes(setup, shape) / GIB:.3g} GiB, more than there is; accepted: fewer tokens, activation checkpointing, or a grid that "
        "divides the model further (tools/estimate_memory.py lists them)"
    )


def needed_bytes(setup: Setup, shape: GridShape) -> int:
    """Of tensors, on the rank that needs most."""
    dtype, _ = choose_dtype(setup.config.train.dtype, local_device())
    return largest_rank(setup.config, setup.model, shape, dtype)[1].total


@contextmanager
def showing_progress(active: bool) -> Iterator[Callable[[int, int], None]]:
    """A function to call with the measurements done and to be done: a bar on a terminal, a line now and then elsewhere."""
    console = Console(stderr=True, highlight=False)
    if not active:
        yield lambda done, total: None
    elif console.is_terminal:
        columns = TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TextColumn("ETA {task.fields[left]}")
        with Progress(*columns, console=console, transient=True) as bar:
            task, begin = bar.add_task("measuring", total=None, left="?"), time.monotonic()
            yield lambda done, total: bar.update(task, completed=done, total=total, left=time_left(begin, done, total))
    else:
        yield printing_lines()


def printing_lines() -> Callable[[int, int], None]:
    """Prints every few seconds how many measurements are done."""
    begin = last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"{done} of {total} measurements, ETA {time_left(begin, done, total)}", file=sys.stderr, flush=True)

    return line


def time_left(begin: float, done: int, total: int) -> str:
    """As if what is left took as long as what is done; right at the end of each round."""
    return duration((time.monotonic() - begin) / done * (total - done))


if __name__ == "__main__":
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    # As in examples/pretrain.py: DeepSpeed keeps process groups alive whose threads now and then abort the interpreter while it ends.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
