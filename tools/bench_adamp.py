"""One AdamP step beside others, on the matrices of Llama layers: torch's fused AdamW, the fused kernel, plain AdamP and PyPI's.

    python tools/bench_adamp.py --scale 4 --threads 2

By the bytes that have to be moved, fused AdamP cannot take less than 40 / 28 = 1.43 times as long as fused AdamW where the tensors do not
fit into caches. Gradients are random; PyPI's and plain AdamP take longer when they project, the others always as long.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import adamp
import torch
from torch import Tensor

from megatron_ext.optim.adamp import AdamP

RULE = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
WIDTH, HIDDEN = 4096, 11008

Way = Callable[[], Sequence[Tensor]]


def cases(options: Any) -> Iterator[Any]:
    """For ``bench_kernels.py``: one case, in float32, the dtype of master weights."""
    from bench_kernels import Case

    if options.dtype == torch.float32:
        ways = steps(options.scale, options.layers, options.device)
        yield Case(f"adamp, {options.layers} layers of width {WIDTH // options.scale}, float32", ways)


def steps(scale: int, layers: int, device: torch.device) -> dict[str, Way]:
    """One optimizer step by name, each on its own copy of float32 parameters, which it returns; the gradients are the same tensors.

    ``scale`` divides the widths of a Llama of 7 billion parameters.
    """
    width, hidden = WIDTH // scale, HIDDEN // scale
    shapes = [(width, width)] * 4 + [(hidden, width)] * 2 + [(width, hidden)] + [(width,)] * 2
    values = [torch.randn(shape, device=device) * 0.02 for _ in range(layers) for shape in shapes]
    gradients = [torch.randn_like(value) * 1e-3 for value in values]
    rules: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
        "torch AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, **RULE, fused=True),
        "AdamP, fused": lambda parameters: AdamP(parameters, **RULE, fused=True),
        "AdamP": lambda parameters: AdamP(parameters, **RULE),
        "PyPI adamp": lambda parameters: adamp.AdamP(parameters, **RULE),
    }
    if device.type != "cpu":
        del rules["AdamP, fused"]
    return {name: _step(rule, values, gradients) for name, rule in rules.items()}


def _step(rule: Callable[..., torch.optim.Optimizer], values: Sequence[Tensor], gradients: Sequence[Tensor]) -> Way:
    parameters = [torch.nn.Parameter(value.clone()) for value in values]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer = rule(parameters)

    def step() -> Sequence[Tensor]:
        optimizer.step()
        return [parameter.detach() for parameter in parameters]

    return step


def measure(ways: dict[str, Way], rounds: int) -> dict[str, list[float]]:
    """Seconds by way and round, after one step of each that does not count; in every other round in the opposite order."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for step in ways.values():
        step()
    for number in range(rounds):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            begin = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=4, help="divides the widths of a Llama of 7 billion parameters")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    ways = steps(arguments.scale, arguments.layers, torch.device("cpu"))
    size = sum(tensor.numel() for tensor in next(iter(ways.values()))())
    seconds = measure(ways, arguments.rounds)
    base, *_ = seconds.values()
    print(f"{size:,} float32 values, {arguments.threads} threads, {arguments.rounds} rounds, the ways in turn in each")
    print(f"{'':20}{'ms (median)':>12}{'of the first: min':>20}{'median':>8}{'max':>8}")
    for name, mine in seconds.items():
        ratios = sorted(a / b for a, b in zip(mine, base, strict=True))
        print(f"{name:20}{statistics.median(mine) * 1e3:12.2f}{ratios[0]:20.2f}{statistics.median(ratios):8.2f}{ratios[-1]:8.2f}")


if __name__ == "__main__":
    main()
