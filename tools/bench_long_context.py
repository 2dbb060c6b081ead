"""The longest document that can be trained in a fixed amount of memory, and the time of a token.

    python tools/bench_long_context.py --mebibytes 48
    python tools/bench_long_context.py --ranks 4 --csv tools/bench_results/long_context.csv

Forward and backward of one document through the same small Llama in several ways, each on one rank and on ``--ranks`` that share it:

  transformers        LlamaForCausalLM with sdpa, logits whole
    + recompute       its gradient checkpointing
    + ALST            with TiledMLP and TiledFusedLogitsLoss of deepspeed.runtime.sequence_parallel.ulysses_sp; ranks share the document by
                      UlyssesSPAttentionHF of the same
  megatron_ext        as it trains by default: logits in chunks
    + tiles           and MLPs too, both over tiles of --tile tokens
    + recompute       and blocks recomputed
    + recompute, tiles

Every probe of a length is a process of its own, forked from one that has imported everything; freed memory goes back to the system. What
counts is the high-water mark of its resident memory less that of a step of a tiny model: parameters, gradients, activations and buffers, no
optimizer. Of several ranks the one with most counts. The longest length is found by bisection, to ``--precision``. Before
that all ways must compute the same loss. Documents are random tokens; ratios of time are of rounds in which the ways take turns.
"""

import argparse
import csv
import ctypes
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from megatron_ext.checkpoint.hf_config import config_to_hf
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.model.mlp import set_tile
from megatron_ext.parallel.device import peak_memory_bytes
from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.sequence import Sharing
from megatron_ext.parallel.world import World

MEBI = 2**20
M_MMAP_THRESHOLD = -3
"""Of glibc's mallopt."""
PRELOADED = (
    "megatron_ext.model.gpt",
    "megatron_ext.checkpoint.hf_config",
    "transformers.models.llama.modeling_llama",
    "deepspeed.runtime.sequence_parallel.ulysses_sp",
)
"""What the process has imported from which probes are forked."""
GRAIN = 64
"""Lengths are multiples of it."""
Step = Callable[[Tensor], float]
"""Forward and backward of this rank's part of a document; its part of the sum of the losses."""


@dataclass(frozen=True)
class Way:
    """How a document is computed."""

    library: str
    recompute: bool = False
    tiles: bool = False

    def __str__(self) -> str:
        tiles = "ALST" if self.library == "transformers" else "tiles"
        added = [name for name, on in (("recompute", self.recompute), (tiles, self.tiles)) if on]
        return f"{self.library} + {', '.join(added)}" if added else self.library


WAYS = (
    Way("transformers"),
    Way("transformers", recompute=True),
    Way("transformers", recompute=True, tiles=True),
    Way("megatron_ext"),
    Way("megatron_ext", tiles=True),
    Way("megatron_ext", recompute=True),
    Way("megatron_ext", recompute=True, tiles=True),
)


@dataclass(frozen=True)
class Setting:
    """What all ways share."""

    config: ModelConfig
    tile: int


def share(length: int, ranks: int) -> int:
    """Tokens of each rank: DeepSpeed's needs equal parts."""
    return length // ranks


def step_of(way: Way, setting: Setting, world: World, length: int) -> Step:
    """The step of a way for documents of ``length`` tokens."""
    return (our_step if way.library == "megatron_ext" else their_step)(way, setting, world, length)


def warm_up(way: Way, world: World) -> None:
    """Let the libraries take what they keep: a step of a tiny model, and an exchange."""
    tiny = Setting(ModelConfig(16, 16, 16, 1, 4, 4, 4, GRAIN), GRAIN // 2)
    step_of(way, tiny, World(0, 1, world.device), GRAIN)(torch.zeros(GRAIN + 1, dtype=torch.int64))
    if world.size > 1:
        dist.all_to_all_single(torch.empty(GRAIN), torch.zeros(GRAIN))


def our_step(way: Way, setting: Setting, world: World, length: int) -> Step:
    """A step of this library."""
    model = GPT(setting.config, "sdpa", "full" if way.recompute else "none")
    model.reset_parameters(0)
    set_tile(model.train(), setting.tile if way.tiles else None)
    model.loss_tile = setting.tile if way.tiles else None
    part = share(length, world.size)
    heads = Grid(world, GridShape(1, world.size, 1)).block(world.size)
    sharing = Sharing(heads, (part,) * world.size) if world.size > 1 and heads is not None else None
    positions = torch.arange(world.rank * part, (world.rank + 1) * part)
    boundaries = torch.tensor([0, length], dtype=torch.int32)

    def step(tokens: Tensor) -> float:
        loss, _ = model(tokens[:-1], positions, boundaries, length, tokens[1:], torch.ones(part), sharing)
        (loss / length).backward()
        return loss.item()

    return step


def their_step(way: Way, setting: Setting, world: World, length: int) -> Step:
    """A step of transformers, with DeepSpeed's pieces where ``way`` says so or ranks share the document."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**config_to_hf(setting.config, dtype="float32"), attn_implementation="sdpa")).train()
    ours = GPT(setting.config)
    ours.reset_parameters(0)
    model.load_state_dict(ours.state_dict(), strict=False)
    del ours
    if way.recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if world.size > 1:
        share_by_ulysses(model)
    if way.tiles:
        tile_mlps(model, setting.tile)
    part = share(length, world.size)
    positions = torch.arange(world.rank * part, (world.rank + 1) * part)[None]

    def step(tokens: Tensor) -> float:
        hidden = model.model(input_ids=tokens[None, :-1], position_ids=positions, use_cache=False).last_hidden_state
        loss = (
            tiled_loss(model.lm_head, hidden, tokens[None, 1:], setting.tile)
            if way.tiles
            else plain_loss(model.lm_head, hidden, tokens[1:])
        )
        (loss / length).backward()
        return loss.item()

    return step


def share_by_ulysses(model: nn.Module) -> None:
    """Let the attention of ``model`` be shared by all ranks of the process group."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", dist.get_world_size(), micro_batch_size=1)


def tile_mlps(model: nn.Module, tile: int) -> None:
    """Let the MLPs of transformers' Llama compute by DeepSpeed's TiledMLP."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP
    from transformers.models.llama.modeling_llama import LlamaMLP

    def gated(mlp: LlamaMLP, x: Tensor) -> Tensor:
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))

    def forward(mlp: LlamaMLP, x: Tensor) -> Tensor:
        return TiledMLP.apply(gated, mlp, x, math.ceil(x.shape[1] / tile), list(mlp.parameters()))

    for module in model.modules():
        if isinstance(module, LlamaMLP):
            module.forward = partial(forward, module)


def plain_loss(head: nn.Linear, hidden: Tensor, labels: Tensor) -> Tensor:
    """Sum of the losses from whole logits."""
    return F.cross_entropy(head(hidden[0]), labels, reduction="sum")


def tiled_loss(head: nn.Linear, hidden: Tensor, labels: Tensor, tile: int) -> Tensor:
    """The same by DeepSpeed's TiledFusedLogitsLoss."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    def of_shard(head: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(head(x), y, reduction="sum")

    shards = math.ceil(hidden.shape[1] / tile)
    return TiledFusedLogitsLoss.apply(of_shard, head, hidden, labels, None, shards, list(head.parameters()), "sum")


@dataclass(frozen=True)
class Probe:
    """What one length took: mean loss of a token, most bytes of a rank, and seconds of the last step."""

    loss: float
    peak: int
    seconds: float


def probe(way: Way, setting: Setting, ranks: int, length: int, steps: int = 1) -> Probe:
    """Forward and backward of a document of ``length`` tokens, ``steps`` times, in new processes."""
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe() for _ in range(ranks)]
        processes = [
            context.Process(target=_rank, args=(rank, ranks, f"{folder}/store", theirs, way, setting, length, steps), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(processes, pipes, strict=True):
            process.start()
            theirs.close()  # so that a rank that fails ends the wait for it
        answers = [ours.recv() for ours, _ in pipes]
        for process in processes:
            process.join()
    losses, peaks, seconds = zip(*answers, strict=True)
    return Probe(sum(losses) / length, max(peaks), max(seconds))


def _rank(rank: int, ranks: int, store: str, answer: Connection, way: Way, setting: Setting, length: int, steps: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_SIZE=str(ranks))
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    torch.set_num_threads(1)
    world = World(rank, ranks, torch.device("cpu"))
    if ranks > 1:
        dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=timedelta(minutes=10))
    tokens = torch.randint(setting.config.vocab_size, (length + 1,), generator=torch.Generator().manual_seed(0))
    part = share(length, ranks)
    mine = tokens[rank * part : (rank + 1) * part + 1]
    warm_up(way, world)
    floor = peak_memory_bytes(world.device)
    step = step_of(way, setting, world, length)
    for _ in range(steps):
        begin = time.perf_counter()
        loss = step(mine)
        seconds = time.perf_counter() - begin
    answer.send((loss, peak_memory_bytes(world.device) - floor, seconds))
    os._exit(0)


def longest(way: Way, setting: Setting, ranks: int, budget: float, precision: float, guess: int = 4 * GRAIN) -> int:
    """The longest length whose probe takes at most ``budget`` bytes, or less by ``precision`` of it; a multiple of ``GRAIN``, 0 if none.

    ``guess``, a multiple of ``GRAIN``, is tried first.
    """
    low, high = 0, max(GRAIN, guess)
    while probe(way, setting, ranks, high).peak <= budget:
        low, high = high, high + max(GRAIN, high // 2 // GRAIN * GRAIN)
    while high - low > max(GRAIN, precision * low):
        middle = (low + high) // 2 // GRAIN * GRAIN
        low, high = (middle, high) if probe(way, setting, ranks, middle).peak <= budget else (low, middle)
    return low


def check_losses(setting: Setting, cases: Sequence[tuple[Way, int]]) -> None:
    """All ways must compute the same loss of one document."""
    found = {f"{way} on {ranks}": probe(way, setting, ranks, 8 * GRAIN).loss for way, ranks in cases}
    expected = next(iter(found.values()))
    if any(abs(loss - expected) > 1e-4 * expected for loss in found.values()):
        raise SystemExit(f"the ways do not compute the same loss: {found}")


def relative_times(setting: Setting, cases: Sequence[tuple[Way, int]], length: int, rounds: int) -> dict[tuple[Way, int], list[float]]:
    """Seconds of a token in each round; of no rounds, nothing."""
    seconds: dict[tuple[Way, int], list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for way, ranks in cases:
            seconds[way, ranks].append(probe(way, setting, ranks, length, steps=2).seconds / length)
    return seconds


def rows_of(lengths: dict[tuple[Way, int], int], seconds: dict[tuple[Way, int], list[float]]) -> Iterator[dict[str, str | int | float]]:
    """A row of the table for each case, against the first."""
    first, base = next(iter(lengths.values())), next(iter(seconds.values()))
    for (way, ranks), length in lengths.items():
        row = {"way": str(way), "ranks": ranks, "longest": length, "of the first": round(length / first, 2)}
        ratios = sorted(mine / theirs for mine, theirs in zip(seconds[way, ranks], base, strict=True))
        named = ("time of a token, of the first: min", "median", "max")
        times = (ratios[0], statistics.median(ratios), ratios[-1]) if ratios else ()
        yield row | dict.fromkeys(named, "") | {name: round(ratio, 2) for name, ratio in zip(named, times, strict=False)}


def report(title: str, rows: Sequence[dict[str, str | int | float]], path: Path | None) -> None:
    """Print the table, and write it to ``path``."""
    table = Table(title=title)
    for heading in rows[0]:
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()))
    Console(width=130).print(table)
    if path is not None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*rows[0], "conditions"])
            writer.writerows([*row.values(), title] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=float, default=48.0, help="memory of a rank")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="numbers of ranks that share the document")
    parser.add_argument("--ways", nargs="+", default=[str(way) for way in WAYS], choices=[str(way) for way in WAYS], metavar="WAY")
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--tile", type=int, default=128, help="tokens of a tile")
    parser.add_argument("--precision", type=float, default=0.05, help="of the longest length")
    parser.add_argument("--rounds", type=int, default=3, help="of timing; 0: none")
    parser.add_argument("--csv", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    hidden, layers, budget = arguments.hidden_size, arguments.layers, arguments.mebibytes * MEBI
    config = ModelConfig(arguments.vocab_size, hidden, 4 * hidden, layers, 4, 4, hidden // 4, 2**20)
    setting = Setting(config, arguments.tile)
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOADED))
    cases = [(way, ranks) for ranks in arguments.ranks for way in WAYS if str(way) in arguments.ways]
    check_losses(setting, cases)
    lengths = {}
    for way, ranks in cases:
        alone = lengths.get((way, 1), 4 * GRAIN // ranks)
        lengths[way, ranks] = longest(way, setting, ranks, budget, arguments.precision, ranks * alone)
        print(f"{way} on {ranks}: {lengths[way, ranks]:,} tokens", flush=True)
    at = max(GRAIN, min(lengths.values()) // GRAIN * GRAIN)
    seconds = relative_times(setting, cases, at, arguments.rounds)
    title = (
        f"longest document in {arguments.mebibytes:g} MiB a rank: {config.num_parameters():,} parameters, {layers} layers, width {hidden}, "
        f"vocabulary {arguments.vocab_size:,}, float32, tiles of {setting.tile}; times at {at:,} tokens, {arguments.rounds} rounds"
    )
    report(title, list(rows_of(lengths, seconds)), arguments.csv)


if __name__ == "__main__":
    main()
