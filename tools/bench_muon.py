"""Whole optimizer steps beside fused AdamW's, and what share of a training step they take.

    python tools/bench_muon.py --config examples/configs/quickstart_pretrain.yaml tokenizer=null model.vocab_size=2048

Measured: the steps, forward and backward of one pack of ``data.tokens_per_step`` at the size of the configuration, in turn in one run.
Computed from measured rates, and said so: Muon's share at 8 billion parameters, where operations of both are counted and divided by the
rates of a matrix product and of Newton-Schulz on matrices of those shapes, ``--scale`` times narrower.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from bench_ranks import print_ratios
from rich.progress import track

from megatron_ext.config import RunConfig, load_config
from megatron_ext.data.batch import PackedBatch
from megatron_ext.kernels.newton_schulz import newton_schulz
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT, parameter_shapes
from megatron_ext.optim import AdamP, AdamW, Muon
from megatron_ext.optim.adamw import decay_groups
from megatron_ext.optim.options import OptimizerOptions
from megatron_ext.optim.routing import route

LLAMA_8B = ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, 8192)
STEPS = 5
Way = Callable[[], object]


def optimizer_steps(model: ModelConfig, options: OptimizerOptions) -> dict[str, Way]:
    """One step of each on float32 copies of the model's parameters with random gradients. AdamW takes what the others leave."""
    shapes = parameter_shapes(model)
    hidden = [name for name, rule in route(shapes, OptimizerOptions(rule="muon")).items() if rule == "muon"]

    def tensors(names: list[str]) -> list[tuple[str, torch.nn.Parameter]]:
        made = [(name, torch.nn.Parameter(torch.randn(shapes[name]) * 0.02)) for name in names]
        for _, parameter in made:
            parameter.grad = torch.randn_like(parameter)
        return made

    def beside(make: Callable[[list[tuple[str, torch.nn.Parameter]]], torch.optim.Optimizer], names: list[str]) -> Way:
        parts = [make(tensors(names))]
        if rest := [name for name in shapes if name not in names]:
            parts.append(AdamW(decay_groups(tensors(rest), options.weight_decay)))
        return lambda: [part.step() for part in parts]

    return {
        "AdamW, fused": beside(lambda named: AdamW(decay_groups(named, options.weight_decay)), list(shapes)),
        "AdamP, fused": beside(lambda named: AdamP([p for _, p in named], fused=True), list(shapes)),
        "Muon": beside(lambda named: Muon(named), hidden),
        "NorMuon": beside(lambda named: Muon(named, normuon=True), hidden),
        "torch.optim.Muon": beside(lambda named: torch.optim.Muon([p for _, p in named]), hidden),
    }


def passes(config: RunConfig, model: ModelConfig) -> Way:
    """Forward and backward of one pack of as many documents as fit into a step."""
    length, tokens = config.data.sequence_length, config.data.tokens_per_step
    documents = tokens // length
    network = GPT(model, "sdpa")
    network.reset_parameters(0)
    ids = torch.randint(model.vocab_size, (2, documents * length))
    positions = torch.arange(length).repeat(documents)
    boundaries = torch.arange(0, documents * length + 1, length, dtype=torch.int32)
    sources = torch.zeros(documents * length, dtype=torch.int64)
    pack = PackedBatch(ids[0], ids[1], positions, boundaries, torch.ones(documents * length), sources, length)

    def run() -> None:
        network.zero_grad()
        network(*pack.model_inputs)[0].backward()

    return run


def measure(ways: dict[str, Way], rounds: int, title: str) -> dict[str, list[float]]:
    """Seconds by way and round, in turn, after one of each that does not count."""
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in track(range(rounds), description=title, transient=True):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            begin = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def product_operations(rows: int, columns: int) -> float:
    """Of Newton-Schulz with plain products: 2 n^2 m, 2 n^3 and 2 n^2 m a step for n <= m."""
    n, m = sorted((rows, columns))
    return STEPS * (4.0 * n * n * m + 2.0 * n**3)


def share_at_8b(scale: int, rounds: int, tokens_per_step: int, dtype: torch.dtype) -> float:
    """Seconds of Newton-Schulz over those of forward and backward of a step, of Llama-3 8B."""
    shapes = {name: shape for name, shape in parameter_shapes(LLAMA_8B).items() if "_proj.weight" in name}
    ways: dict[str, Way] = {}
    operations: dict[str, float] = {}
    for rows, columns in sorted(set(shapes.values())):
        matrix = torch.randn(rows // scale, columns // scale, dtype=dtype)
        ways[f"{rows} x {columns}"] = lambda matrix=matrix: newton_schulz(matrix, dtype=dtype)
        operations[f"{rows} x {columns}"] = product_operations(rows // scale, columns // scale)
    tokens, weight = torch.randn(LLAMA_8B.hidden_size // scale, LLAMA_8B.hidden_size // scale, dtype=dtype), torch.randn(
        LLAMA_8B.intermediate_size // scale, LLAMA_8B.hidden_size // scale, dtype=dtype
    )  # fmt: skip
    ways["product"] = lambda: tokens @ weight.T
    operations["product"] = 2.0 * tokens.numel() * len(weight)
    seconds = measure(ways, rounds, "rates")
    rates = {name: operations[name] / statistics.median(each) for name, each in seconds.items()}
    print(", ".join(f"{name} {rate / rates['product']:.2f}" for name, rate in rates.items()), "of the rate of a product")
    orthogonalization = sum(product_operations(*shape) / rates[f"{shape[0]} x {shape[1]}"] for shape in shapes.values())
    return orthogonalization / (tokens_per_step * LLAMA_8B.flops_per_token(4096) / rates["product"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--scale", type=int, default=8, help="divides the widths of the model of 8 billion parameters")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = load_config(arguments.config, arguments.overrides)
    model = ModelConfig.from_options(config.model, config.model.vocab_size or 2048, config.data.sequence_length)
    ways = {**optimizer_steps(model, config.optimizer), "forward and backward": passes(config, model)}
    seconds = measure(ways, arguments.rounds, "steps")
    title = f"one step, {model.num_parameters():,} parameters, {config.data.tokens_per_step:,} tokens, {arguments.threads} threads"
    print_ratios(title, "way", "AdamW, fused", seconds, "seconds", "less")
    for name in ("AdamW, fused", "AdamP, fused", "Muon", "NorMuon"):
        shares = sorted(a / (a + b) for a, b in zip(seconds[name], seconds["forward and backward"], strict=True))
        print(f"{name}: {shares[0]:.1%} / {statistics.median(shares):.1%} / {shares[-1]:.1%} of a training step (min / median / max)")
    for tokens in (2**19, 2**22):
        share = share_at_8b(arguments.scale, 3, tokens, torch.float32)
        print(f"computed for 8B and {tokens:,} tokens a step: Newton-Schulz is {share:.2%} of forward and backward on as many devices")


if __name__ == "__main__":
    main()
