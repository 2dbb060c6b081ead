"""Tokens/s of the same model and packs on several grids, each way in processes of its own, rounds alternating.

    python tools/bench_grids.py --grids 1 dp2 dp2-no-overlap tp2 pp2

A grid is named by its axes, such as dp2tp2; ``-no-overlap`` sends gradients only after the last backward. Two ranks get twice the packs of
one (weak scaling); all grids of as many ranks get the same packs.
"""

import argparse
import re
import time

import torch
from bench_ranks import Ranks, State, print_ratios
from bench_training import pack_of
from rich.progress import track

from megatron_ext.data.batch import PackedBatch
from megatron_ext.kernels.varlen_attention import select_backend
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.optim.options import OptimizerOptions
from megatron_ext.parallel.device import choose_dtype, synchronize
from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.pipeline import balanced, stages
from megatron_ext.parallel.tensor import TensorParallel
from megatron_ext.parallel.world import World
from megatron_ext.train.build import build_optimizer
from megatron_ext.train.engine import owner_engine


def shape_of(name: str) -> tuple[GridShape, bool]:
    """Grid and whether reductions overlap, from a name such as ``dp2tp2-no-overlap``."""
    sizes = {axis: int(size) for axis, size in re.findall(r"(dp|tp|pp)(\d+)", name)}
    return GridShape(sizes.get("pp", 1), sizes.get("dp", 1), sizes.get("tp", 1)), not name.endswith("-no-overlap")


def packs_of(model: ModelConfig, ranks: int, packs_per_rank: int, tokens: int) -> list[PackedBatch]:
    """Packs of documents of uneven lengths, ``packs_per_rank`` for each rank."""
    generator = torch.Generator().manual_seed(0)
    packs = []
    for _ in range(ranks * packs_per_rank):
        cuts = torch.randint(1, tokens, (4,), generator=generator).sort().values.tolist()
        lengths = [b - a for a, b in zip([0, *cuts], [*cuts, tokens], strict=True) if b > a]
        packs.append(pack_of([torch.randint(model.vocab_size, (length,), generator=generator) for length in lengths]))
    return packs


def set_up(world: World, state: State, name: str, model_config: ModelConfig, packs_per_rank: int, tokens: int) -> float:
    """Make model, optimizer and engine, and take a step; returns its loss."""
    shape, overlap = shape_of(name)
    grid = Grid(world, shape, kv_copies=max(1, shape.tp // model_config.num_kv_heads))
    dtype, _ = choose_dtype("auto", world.device)
    backend, _ = select_backend("auto", world.device, dtype, model_config.head_dim)
    ends = model_config.embedding_parameters
    layers = balanced(model_config.num_layers, shape.pp, model_config.block_parameters, ends, ends)
    model = GPT(model_config, backend, tp=TensorParallel(grid.tp), stage=stages(layers)[grid.stage])
    model.reset_parameters(0)
    model.to(world.device, dtype)
    optimizer = build_optimizer(model, OptimizerOptions(overlap_reduction=overlap), grid)
    config = {
        "train_batch_size": shape.dp,
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": shape.pp > 1,
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        "gradient_clipping": 0.0,
        "steps_per_print": 2**62,
    }
    state["engine"] = owner_engine(model, optimizer, grid, config, 1)
    state["packs"] = packs_of(model_config, shape.size, packs_per_rank, tokens)[grid.dp.rank :: shape.dp]
    return step(world, state)[1]


def step(world: World, state: State) -> tuple[float, float]:
    """Seconds of a step, and its loss."""
    begin = time.perf_counter()
    loss = state["engine"].step(state["packs"], 10_000, torch.zeros(0, dtype=torch.float64)).loss
    synchronize(world.device)
    return time.perf_counter() - begin, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", nargs="+", default=["1", "dp2", "dp2-no-overlap", "tp2", "pp2"], metavar="GRID")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--tokens-per-pack", type=int, default=1024)
    parser.add_argument("--packs-per-rank", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    hidden = arguments.hidden_size
    heads = max(1, hidden // 64)
    model = ModelConfig(
        arguments.vocab_size, hidden, hidden * 11 // 4, arguments.layers, heads, max(1, heads // 2), 64, arguments.tokens_per_pack
    )
    ways = {name: Ranks(shape_of(name)[0].size) for name in arguments.grids}
    for name, ranks in ways.items():
        losses = ranks.run(set_up, name, model, arguments.packs_per_rank, arguments.tokens_per_pack)
        print(f"{name}: {shape_of(name)[0]}, loss of the first step {losses[0]:.6f}")
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in track(range(arguments.rounds), description="rounds"):
        for name, ranks in ways.items():
            tokens = shape_of(name)[0].size * arguments.packs_per_rank * arguments.tokens_per_pack
            rates[name].append(tokens / max(seconds for seconds, _ in ranks.run(step)))
    for ranks in ways.values():
        ranks.close()
    title = f"{model.num_parameters():,} parameters, {arguments.packs_per_rank} packs of {arguments.tokens_per_pack} tokens for each rank"
    print_ratios(title, "grid", arguments.grids[0], rates, "tokens/s", "more")


if __name__ == "__main__":
    main()
