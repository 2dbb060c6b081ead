"""One AdamP step beside others, on the matrices of Llama layers: the fused kernel, torch's fused AdamW, plain AdamP and PyPI's.

    python tools/bench_adamp.py --scale 0.25 --threads 2

By the bytes that have to be moved, fused AdamP cannot take less than 40 / 28 = 1.43 times as long as fused AdamW where the tensors do not
fit into caches. Gradients are random, as at the start of a training; PyPI's takes longer when it projects, the others always as long.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import adamp
import torch

from megatron_ext.optim.adamp import AdamP

RULE = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}


def llama_matrices(scale: float, layers: int) -> list[torch.nn.Parameter]:
    """Float32 parameters of ``layers`` layers of Llama 3 8B, widths multiplied by ``scale``, with random gradients."""
    hidden, heads, feed_forward = (max(1, round(size * scale)) for size in (4096, 1024, 14336))
    shapes = [(hidden, hidden), (heads, hidden), (heads, hidden), (hidden, hidden), (hidden,), (hidden,)]
    shapes += [(feed_forward, hidden), (feed_forward, hidden), (hidden, feed_forward)]
    parameters = [torch.nn.Parameter(torch.randn(shape) * 0.02) for _ in range(layers) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return parameters


def steps(scale: float, layers: int) -> dict[str, Callable[[], object]]:
    """One optimizer step by name, all on the same parameters and gradients; the first is what the others are compared with."""
    parameters = llama_matrices(scale, layers)
    return {
        "torch AdamW, fused": torch.optim.AdamW(parameters, **RULE, fused=True).step,
        "AdamP, fused": AdamP(parameters, **RULE, fused=True).step,
        "AdamP": AdamP(parameters, **RULE).step,
        "PyPI adamp": adamp.AdamP(parameters, **RULE).step,
    }


def measure(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, the ways in turn, after one step of each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for counted in (False, *[True] * rounds):
        for name, step in ways.items():
            begin = time.perf_counter()
            step()
            if counted:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=0.25, help="of the widths of Llama 3 8B")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    seconds = measure(steps(arguments.scale, arguments.layers), arguments.rounds)
    size = sum(parameter.numel() for parameter in llama_matrices(arguments.scale, arguments.layers))
    base, *_ = seconds.values()
    print(f"{size:,} float32 values, {arguments.threads} threads, {arguments.rounds} rounds, the ways in turn in each")
    print(f"{'':20}{'ms (median)':>12}{'of the first: min':>20}{'median':>8}{'max':>8}")
    for name, mine in seconds.items():
        ratios = sorted(a / b for a, b in zip(mine, base, strict=True))
        print(f"{name:20}{statistics.median(mine) * 1e3:12.2f}{ratios[0]:20.2f}{statistics.median(ratios):8.2f}{ratios[-1]:8.2f}")


if __name__ == "__main__":
    main()
