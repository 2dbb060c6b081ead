"""Seconds of kernels beside those of what is used elsewhere, in turn in one run.

    python tools/bench_kernels.py --kernel newton_schulz --scale 8 --dtypes float32 bfloat16

A kernel's benchmark is a function from ``Options`` to ``Case``s in a module of its own (``bench_<kernel>.py``), and a line in ``KERNELS``.
Before anything is timed, each way's result is compared with that of the first.
"""

import argparse
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bench_memory import bandwidths, print_bandwidths, write_csv
from bench_ranks import print_ratios
from rich.progress import track
from torch import Tensor

from megatron_ext.parallel.device import DTYPES, choose_dtype, describe, local_device, synchronize

KERNELS = {
    "adamp": "bench_adamp",
    "fp8_gemm": "bench_fp8_gemm",
    "fp8_quantize": "bench_fp8_quantize",
    "hadamard": "bench_hadamard",
    "max_logits": "bench_max_logits",
    "mxfp4_quantize": "bench_mxfp4_quantize",
    "newton_schulz": "bench_newton_schulz",
    "norm": "bench_norm",
    "nvfp4_gemm": "bench_nvfp4_gemm",
    "nvfp4_quantize": "bench_nvfp4_quantize",
}
"""Modules that have ``cases(options)``, by name of the kernel."""
SEED = 0


@dataclass(frozen=True)
class Options:
    """Where and on what a kernel is timed."""

    device: torch.device
    dtype: torch.dtype
    scale: int
    """By how much the widths of the model are divided."""
    layers: int
    """Of the model whose tensors are used."""
    steps: int | None
    """Of iterative kernels; None: as many as usual."""


@dataclass(frozen=True)
class Case:
    """One table: ways to compute the same, of which the first is what the others are compared with."""

    title: str
    ways: dict[str, Callable[[], Sequence[Tensor]]]
    moved: dict[str, float] = field(default_factory=dict)
    """Of kernels that mostly move memory: the bytes of each way. They are compared with a copy by bytes a second, and not by results."""


Benchmark = Callable[[Options], Iterator[Case]]


def difference(mine: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest over the tensors of the norm of the difference, relative to the norm expected."""
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(mine, expected, strict=True))


def measure(case: Case, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds by way and round; in every other round the ways run in the opposite order."""
    seconds: dict[str, list[float]] = {name: [] for name in case.ways}
    for number in track(range(rounds), description=case.title, transient=True):
        for name in list(case.ways)[:: 1 if number % 2 else -1]:
            synchronize(device)
            begin = time.perf_counter()
            case.ways[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def report_bandwidths(case: Case, rounds: int, device: torch.device, csv: Path | None) -> None:
    """Print GB/s of the ways of a case and the fractions of a copy's; append them to ``csv``."""
    for way in case.ways.values():
        way()  # what the first call builds is not timed
    rows = bandwidths(measure(case, rounds, device), case.moved)
    print_bandwidths(f"{case.title} on {describe(device)}", rows)
    if csv is not None:
        write_csv(csv, case.title, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=KERNELS, nargs="+", default=list(KERNELS))
    parser.add_argument("--scale", type=int, default=8, help="divides the widths of the model")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of iterative kernels")
    parser.add_argument(
        "--dtypes", nargs="+", choices=["auto", *DTYPES, "float16"], default=["float32", "auto"], help="auto: what is fast here"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--csv", type=Path, help="append GB/s of kernels that mostly move memory to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = local_device()
    named = {name: torch.float16 if name == "float16" else choose_dtype(name, device)[0] for name in arguments.dtypes}
    for kernel in arguments.kernel:
        benchmark: Benchmark = importlib.import_module(KERNELS[kernel]).cases
        for dtype in dict.fromkeys(named.values()):
            torch.manual_seed(SEED)
            for case in benchmark(Options(device, dtype, arguments.scale, arguments.layers, arguments.steps)):
                if case.moved:
                    report_bandwidths(case, arguments.rounds, device, arguments.csv)
                    continue
                first, *others = case.ways
                expected = case.ways[first]()
                for name in others:
                    print(f"{case.title}: {name} differs from {first} by {difference(case.ways[name](), expected):.1e} of its norm")
                title = f"{case.title} on {describe(device)}"
                print_ratios(title, "way", first, measure(case, arguments.rounds, device), "seconds", "less")


if __name__ == "__main__":
    main()
