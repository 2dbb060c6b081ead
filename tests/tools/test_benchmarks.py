"""The benchmarks of ranks run, and print a ratio for every way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "rows"),
    [
        ("bench_optimizer.py --parameters 2000000 --rounds 1 --ways megatron_ext all-reduce", ["megatron_ext", "all-reduce"]),
        (
            "bench_grids.py --grids 1 tp2 pp2 --hidden-size 64 --layers 2 --vocab-size 256 --tokens-per-pack 64 --rounds 1",
            ["tp2: pp 1 x dp 1 x tp 2", "pp2"],
        ),
        (
            "bench_prepacking.py --prompts 6 --median 20 --tokens-per-pack 128 --hidden-size 64 --layers 1 --vocab-size 64 --rounds 1",
            ["megatron_ext, packed", "transformers, sorted, padded"],
        ),
        (
            "bench_long_context.py --mebibytes 16 --hidden-size 16 --layers 1 --vocab-size 64 --rounds 1 --precision 1 --ways transformers "
            "megatron_ext",
            ["transformers on 1: ", "megatron_ext on 1: "],
        ),
        (
            "bench_checkpoint.py --parameters 9000000 --rounds 1",
            ["deepspeed / megatron_ext", "convert", "in the background", "torch async_save"],
        ),
    ],
)
def test_a_small_benchmark_prints_its_table(command: str, rows: list[str]) -> None:
    script, *arguments = command.split()
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(TOOLS / script), *arguments], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert all(row in done.stdout for row in rows), done.stdout
