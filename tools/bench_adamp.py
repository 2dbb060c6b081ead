"""One AdamP step beside others, on the matrices of Llama layers: torch's fused AdamW, the fused kernel, plain AdamP and PyPI's.

    python tools/bench_adamp.py --scale 4 --threads 2

Where tensors do not fit into caches, bytes decide: AdamW moves 28 a value; fused AdamP 28 where nothing is projected and 44 where
everything is (1.57 times); with the decision between its two passes ("parts", what shards need without speculation) always 40 (1.43 times).
Each is also compared with a copy: bytes a second over those of a copy of one tensor of the same size in the same run.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import adamp
import torch
from torch import Tensor

from megatron_ext.kernels.adamp import AdamUpdate, adamp_moments, adamp_step, adamp_update
from megatron_ext.kernels.projection import as_rows, matrices, project, row_sums, summarize
from megatron_ext.optim.adamp import AdamP

RULE = {"lr": 1e-8, "betas": (0.9, 0.95), "weight_decay": 0.1}
"""A rate so small that parameters keep their angles to gradients that stay the same."""
WIDTH, HIDDEN = 4096, 11008
PROJECTED = ("nothing", "rows", "layers")
COPY = "copy"

Way = Callable[[], Sequence[Tensor]]


def cases(options: Any) -> Iterator[Any]:
    """For ``bench_kernels.py``: cases in float32, the dtype of master weights."""
    from bench_kernels import Case

    if options.dtype == torch.float32:
        for projected in PROJECTED:
            values, gradients = problem(options.scale, options.layers, options.device, projected)
            title = f"adamp, {options.layers} layers of width {WIDTH // options.scale}, float32, projected: {projected}"
            yield Case(title, steps(values, gradients))


def problem(scale: int, layers: int, device: torch.device, projected: str) -> tuple[list[Tensor], list[Tensor]]:
    """Values and gradients, float32, so that of every matrix nothing, each row or the layer as a whole is projected.

    ``scale`` divides the widths of a Llama of 7 billion parameters.
    """
    width, hidden = WIDTH // scale, HIDDEN // scale
    shapes = [(width, width)] * 4 + [(hidden, width)] * 2 + [(width, hidden)] + [(width,)] * 2
    values = [torch.randn(shape, device=device) * 0.02 for _ in range(layers) for shape in shapes]
    gradients = [torch.randn_like(value) * 1e-3 for value in values]
    for p, g in zip(map(as_rows, values), map(as_rows, gradients), strict=True):
        if projected == "nothing":
            g += p
        elif projected == "rows":
            g -= p * ((g * p).sum(1, keepdim=True) / p.square().sum(1, keepdim=True))
        else:
            g += p * torch.linspace(-1, 1, len(p), device=device)[:, None]
            g -= p * ((g * p).sum() / p.square().sum())
    return values, gradients


def steps(values: Sequence[Tensor], gradients: Sequence[Tensor]) -> dict[str, Way]:
    """One optimizer step by name, each on its own copy of ``values``, which it returns; the gradients are the same tensors."""
    backend = "cpu" if values[0].device.type == "cpu" else "triton"
    rules: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
        "torch AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, **RULE, fused=True),
        "AdamP": lambda parameters: AdamP(parameters, **RULE),
        "PyPI adamp": lambda parameters: adamp.AdamP(parameters, **RULE),
    }
    ways = {name: _step(rule, values, gradients) for name, rule in rules.items()}
    kernels = {"AdamP, fused": adamp_step, "AdamP, fused, parts": _parts}
    ways |= {name: _kernel(function, values, gradients, backend) for name, function in kernels.items()}
    return {name: ways[name] for name in ("torch AdamW, fused", *kernels, "AdamP", "PyPI adamp")}


def _kernel(function: Callable[..., object], values: Sequence[Tensor], gradients: Sequence[Tensor], backend: str) -> Way:
    parameters, moments = ([value.clone() for value in values], [[torch.zeros_like(value) for value in values] for _ in range(2)])
    done = []

    def step() -> Sequence[Tensor]:
        done.append(None)
        adam = AdamUpdate(len(done), RULE["betas"])
        rule = {"lr": RULE["lr"], "weight_decay": RULE["weight_decay"], "backend": backend, "threads": torch.get_num_threads()}
        function(parameters, gradients, *moments, adam, **rule)
        return parameters

    return step


def _parts(*tensors_and_adam: Any, lr: float, weight_decay: float, backend: Any, threads: int) -> None:
    """The step as shards take it: what is projected is decided between two passes over all values."""
    *tensors, adam = tensors_and_adam
    sums = adamp_moments(*tensors, adam, backend=backend, threads=threads)
    here = matrices(tuple(p.shape for p in tensors[0]), 0.1, tensors[0][0].device)
    projection = project(sums, summarize(sums, here, adam.eps), here, adam.eps)
    decays = projection.decays(lr, weight_decay, 0.1)
    adamp_update(*tensors, adam, projection.coefficients, decays, lr / adam.corrections[0], backend=backend, threads=threads)


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


def decided(values: Sequence[Tensor], gradients: Sequence[Tensor]) -> str:
    """How many matrices are projected, in words."""
    here = matrices(tuple(value.shape for value in values), 0.1, values[0].device)
    sums = torch.cat([row_sums(p, g, g) for p, g in zip(values, gradients, strict=True)])
    projection = project(sums, summarize(sums, here, 1e-8), here, 1e-8)
    matrices_of_all = sum(value.ndim > 1 for value in values)
    return f"projected of {matrices_of_all} matrices: {int(projection.channel.sum())} by rows, {int(projection.layer.sum())} as layers"


def report(ways: dict[str, Way], bytes_of: dict[str, int], rounds: int) -> None:
    """Time all ways and print them as ratios in each round to the first, and to the bytes a second of the copy."""
    seconds = measure(ways, rounds)
    base, *_ = seconds.values()
    print(f"{'':20}{'ms (median)':>12}{'of the first: min':>20}{'median':>8}{'max':>8}{'bytes/s of a copy':>20}")
    for name, mine in seconds.items():
        ratios = sorted(a / b for a, b in zip(mine, base, strict=True))
        line = f"{name:20}{statistics.median(mine) * 1e3:12.2f}{ratios[0]:20.2f}{statistics.median(ratios):8.2f}{ratios[-1]:8.2f}"
        if name in bytes_of:
            rates = [bytes_of[name] / a / (bytes_of[COPY] / b) for a, b in zip(mine, seconds[COPY], strict=True)]
            line += f"{statistics.median(rates):20.0%}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=4, help="divides the widths of a Llama of 7 billion parameters")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--fused-only", action="store_true", help="leave out plain AdamP and PyPI's, which take much longer")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    for projected in PROJECTED:
        values, gradients = problem(arguments.scale, arguments.layers, torch.device("cpu"), projected)
        ways = steps(values, gradients)
        if arguments.fused_only:
            ways = {name: way for name, way in ways.items() if "fused" in name}
        size = sum(value.numel() for value in values)
        source, target = (torch.zeros(size) for _ in range(2))
        ways[COPY] = lambda source=source, target=target: [target.copy_(source)]
        last = 28 if projected == "nothing" else 44
        bytes_of = {"torch AdamW, fused": 28 * size, "AdamP, fused": last * size, "AdamP, fused, parts": 40 * size, COPY: 8 * size}
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            print(f"{size:,} float32 values, {threads} threads, {arguments.rounds} rounds, the ways in turn in each")
            report(ways, bytes_of, arguments.rounds)
        print(decided(ways["AdamP, fused"](), gradients), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
