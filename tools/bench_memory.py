"""What the benchmarks of kernels that mostly move memory share: bytes, GB/s, fractions of a copy timed in the same run, and a CSV.

A kernel counts what it has to read and write at least; a copy of the same matrix, to new memory as the results of kernels, reads and writes
each byte once.
"""

import csv
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

COPY = "copy"
"""Name of the way that the others are compared with."""
TOKENS, WIDTH = 8192, 4096

Row = dict[str, str | float]


def matrix(options: Any, columns: int = WIDTH) -> Tensor:
    """Random values of ``TOKENS`` rows, both sides divided by the scale, in the dtype of the options."""
    return torch.randn(TOKENS // options.scale, columns // options.scale, device=options.device).to(options.dtype)


def copy(x: Tensor) -> tuple[Callable[[], Sequence[Tensor]], float]:
    """Copies ``x`` to new memory, which is where kernels put their results; and the bytes that this moves."""
    return lambda: [x.clone()], 2 * x.nbytes


def bandwidths(seconds: dict[str, list[float]], moved: dict[str, float]) -> list[Row]:
    """Percentiles of milliseconds of each way, GB/s at the median, and the median over the rounds of the fraction of the copy's GB/s."""
    rows: list[Row] = []
    for name, mine in seconds.items():
        p20, p50, p80 = (statistics.quantiles(mine, n=10)[index] * 1e3 for index in (1, 4, 7))
        fractions = [moved[name] / own / (moved[COPY] / theirs) for own, theirs in zip(mine, seconds[COPY], strict=True)]
        speed = moved[name] / p50 / 1e6
        rows.append({"way": name, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "GB/s": speed, "of copy": statistics.median(fractions)})
    return rows


def print_bandwidths(title: str, rows: Sequence[Row]) -> None:
    """A table of ``bandwidths``."""
    table = Table(title=title)
    for heading in rows[0]:
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for row in rows:
        table.add_row(*_texts(row))
    Console(width=110).print(table)


def write_csv(path: Path, case: str, rows: Sequence[Row]) -> None:
    """Append the rows of a case to a file, which is begun with a heading. Each row says what machine and versions it is from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    begin = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if begin:
            writer.writerow(["case", *rows[0], "machine", "versions"])
        for row in rows:
            writer.writerow([case, *_texts(row), _machine(), f"python {platform.python_version()}, torch {torch.__version__}"])


def _texts(row: Row) -> list[str]:
    return [value if isinstance(value, str) else f"{value:.3g}" for value in row.values()]


def _machine() -> str:
    """The model of the processor and the number of its cores here."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
