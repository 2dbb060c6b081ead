"""Training speed side by side with transformers: the same model, documents, optimizer, dtype and threads, in one process.

    python tools/bench_training.py --lengths lengths.npz
    python tools/bench_training.py --corpus runs/quickstart/data/prose.train_text_document

Every way trains a Llama on the same documents, forward, backward and AdamW; their first losses must agree, so that no way does less work:

  padded         transformers, documents in order, padded to the longest of a batch
  length-sorted  transformers, documents sorted by length first
  packed         transformers, documents end to end with a block-diagonal mask and restarting positions
  one by one     transformers, one document at a time
  megatron_ext   best-fit packs, attention by document, the trainer's own engine and optimizer

Each way has a process of its own, set up as its users would: ours as the trainer starts it. Rounds alternate between the ways, so a noisy
machine disturbs all alike; ratios are of tokens/s within a round.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_ext.checkpoint.hf_config import config_to_hf
from megatron_ext.data.batch import PackedBatch
from megatron_ext.data.indexed import IndexedDataset
from megatron_ext.kernels.varlen_attention import select_backend
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.optim.options import OptimizerOptions
from megatron_ext.parallel.device import DTYPES, choose_dtype, local_device, synchronize
from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.world import join_world
from megatron_ext.planning import CostModel, plan_step
from megatron_ext.train.build import build_optimizer
from megatron_ext.train.engine import owner_engine

Documents = list[torch.Tensor]
IGNORED = -100
OURS = "megatron_ext"
WAYS = ("padded", "length-sorted", "packed", "one by one", OURS)


Step = Callable[[Documents], float]


@dataclass
class Setting:
    """What all ways share. Can be sent to another process."""

    config: ModelConfig
    dtype_name: str
    threads: int | None
    budget: int


def transformers_step(setting: Setting, batches: Callable[[Documents], Iterator[dict]]) -> Step:
    """LlamaForCausalLM with PyTorch's fused AdamW over the batches that ``batches`` makes: forward, backward, update; the mean loss."""
    device = local_device()
    if setting.threads:
        torch.set_num_threads(setting.threads)
    dtype, _ = choose_dtype(setting.dtype_name, device)
    model = LlamaForCausalLM(LlamaConfig(**config_to_hf(setting.config, dtype="float32"), attn_implementation="sdpa"))
    model.load_state_dict(first_weights(setting.config), strict=False)
    model = model.to(device, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(documents: Documents) -> float:
        labelled = sum(len(document) - 1 for document in documents)
        total = 0.0
        for batch in batches(documents):
            moved = {key: value.to(device) for key, value in batch.items()}
            loss = model(**moved, use_cache=False, num_items_in_batch=labelled).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def first_weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    """The weights that every way begins with."""
    model = GPT(config)
    model.reset_parameters(0)
    return model.state_dict()


def padded_batches(budget: int, by_length: bool) -> Callable[[Documents], Iterator[dict]]:
    """Batches of at most ``budget`` tokens, padding included."""

    def batches(documents: Documents) -> Iterator[dict]:
        batch: Documents = []
        for document in sorted(documents, key=len) if by_length else documents:
            if batch and (len(batch) + 1) * max(len(document), *map(len, batch)) > budget:
                yield _pad(batch)
                batch = []
            batch.append(document)
        yield _pad(batch)

    return batches


def _pad(batch: Documents) -> dict:
    ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(d) for d in batch], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def packed_batches(budget: int) -> Callable[[Documents], Iterator[dict]]:
    """Best-fit packs with a block-diagonal mask that transformers is given ready-made."""

    def batches(documents: Documents) -> Iterator[dict]:
        for pack in plan_step([len(d) for d in documents], 1, CostModel(budget)).packs:
            chosen = [documents[piece.document] for piece in pack.slices]
            ids = torch.cat(chosen)
            document = torch.repeat_interleave(torch.arange(len(chosen)), torch.tensor([len(d) for d in chosen]))
            mask = (document[:, None] == document[None, :]).tril()
            labels = ids.clone()
            labels[np.cumsum([0] + [len(d) for d in chosen[:-1]])] = IGNORED
            positions = torch.cat([torch.arange(len(d)) for d in chosen])
            yield {"input_ids": ids[None], "attention_mask": mask[None, None], "position_ids": positions[None], "labels": labels[None]}

    return batches


def one_by_one(documents: Documents) -> Iterator[dict]:
    """Each document is a batch."""
    for document in documents:
        yield {"input_ids": document[None], "labels": document[None]}


def our_step(setting: Setting) -> Step:
    """The trainer's process, engine, model and optimizer."""
    world = join_world(setting.threads)
    config = setting.config
    dtype, _ = choose_dtype(setting.dtype_name, world.device)
    backend, _ = select_backend("auto", world.device, dtype, config.head_dim)
    model = GPT(config, backend).to(world.device)
    model.load_state_dict(first_weights(config))
    model.to(dtype)
    grid = Grid(world, GridShape(1, 1, 1))
    optimizer = build_optimizer(model, OptimizerOptions(weight_decay=0.01, betas=(0.9, 0.999)), grid)
    optimizer.set_learning_rate_factor(1 / 3)
    deepspeed_config = {
        "train_batch_size": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 0},
        "steps_per_print": 2**62,
    }
    engine = owner_engine(model, optimizer, grid, deepspeed_config, 1)

    def step(documents: Documents) -> float:
        plan = plan_step([len(d) for d in documents], 1, CostModel(setting.budget))
        packs = [pack_of([documents[piece.document] for piece in pack.slices]) for pack in plan.packs]
        return engine.step(packs, sum(len(d) - 1 for d in documents), torch.zeros(0, dtype=torch.float64)).loss

    return step


def make_step(name: str, setting: Setting) -> Step:
    """The step of a way, by name."""
    if name == OURS:
        return our_step(setting)
    batches = {
        "padded": padded_batches(setting.budget, by_length=False),
        "length-sorted": padded_batches(setting.budget, by_length=True),
        "packed": packed_batches(setting.budget),
        "one by one": one_by_one,
    }
    return transformers_step(setting, batches[name])


def work(name: str, setting: Setting, steps: list[Documents], connection: Connection) -> None:
    """A way in a process of its own: first the loss of an untimed step, then the seconds of each round that is asked for."""
    step = make_step(name, setting)
    connection.send(step(steps[0]))
    while connection.recv():
        begin = time.perf_counter()
        for documents in steps:
            step(documents)
        synchronize(local_device())
        connection.send(time.perf_counter() - begin)


def pack_of(documents: Documents) -> PackedBatch:
    lengths = torch.tensor([len(d) for d in documents])
    tokens = torch.cat(documents)
    ends = torch.cumsum(lengths, 0)
    weight = torch.ones(len(tokens))
    weight[ends - 1] = 0.0
    return PackedBatch(
        tokens=tokens,
        labels=torch.cat([tokens[1:], tokens[:1]]),
        positions=torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths.tolist()]),
        cu_seqlens=torch.nn.functional.pad(ends, (1, 0)).to(torch.int32),
        loss_weight=weight,
        sources=torch.zeros_like(tokens),
        max_seqlen=int(lengths.max()),
    )


def read_documents(arguments: argparse.Namespace, generator: np.random.Generator) -> list[Documents]:
    """Documents of each step: lengths from a file or a corpus, clipped to the sequence length; random tokens."""
    if arguments.lengths:
        lengths = np.load(arguments.lengths, allow_pickle=False)["lengths"]
    else:
        lengths = np.asarray(IndexedDataset(arguments.corpus).lengths)
    lengths = generator.permutation(lengths[lengths >= 2]).clip(max=arguments.sequence_length)
    steps: list[Documents] = [[]]
    tokens = 0
    for length in lengths.tolist():
        if tokens + length > arguments.tokens_per_step:
            if len(steps) == arguments.steps:
                break
            steps.append([])
            tokens = 0
        steps[-1].append(torch.from_numpy(generator.integers(0, arguments.vocab_size, length)))
        tokens += length
    return steps


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int = 1024) -> float:
    """TFLOP/s of a square matrix product, the best of three."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best / 1e12


def measure(setting: Setting, steps: list[Documents], rounds: int) -> tuple[dict[str, list[float]], list[float]]:
    """Tokens/s of each way in each round, after one untimed step in which all must compute the same loss; and each round's matmul rate."""
    device = local_device()
    dtype, _ = choose_dtype(setting.dtype_name, device)
    matmul = []
    context = multiprocessing.get_context("spawn")
    connections = {}
    for name in WAYS:
        ours, theirs = context.Pipe()
        context.Process(target=work, args=(name, setting, steps, theirs), daemon=True).start()
        theirs.close()  # so that a way that fails ends the wait for it
        connections[name] = ours
    losses = {name: connection.recv() for name, connection in connections.items()}
    if max(losses.values()) - min(losses.values()) > 2e-3 * max(losses.values()):
        sys.exit(f"the ways do not compute the same loss: {losses}")
    tokens = sum(len(document) for step in steps for document in step)
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in track(range(rounds), description="rounds"):
        for name, connection in connections.items():
            connection.send(True)
            rates[name].append(tokens / connection.recv())
        matmul.append(matmul_rate(dtype, device))
    for connection in connections.values():
        connection.send(False)
    return rates, matmul


def report(rates: dict[str, list[float]], matmul: list[float], setting: Setting, steps: list[Documents]) -> None:
    """Print the table of ratios, and how near our way comes to the rate of its matrix products."""
    lengths = [len(document) for step in steps for document in step]
    title = f"{sum(lengths):,} tokens in {len(lengths):,} documents, median {int(statistics.median(lengths))}, longest {max(lengths)}"
    table = Table(title=title)
    for column in ("way", "tokens/s (median)", "megatron_ext / it: min", "median", "max"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, theirs in rates.items():
        ratios = sorted(a / b for a, b in zip(rates[OURS], theirs, strict=True))
        table.add_row(name, f"{statistics.median(theirs):,.0f}", *(f"{r:.2f}" for r in (ratios[0], statistics.median(ratios), ratios[-1])))
    console = Console(width=110)
    console.print(table)
    flops = setting.config.flops_per_token(sum(n * n for n in lengths) / sum(lengths))
    achieved = statistics.median(rates[OURS]) * flops / 1e12
    dtype, _ = choose_dtype(setting.dtype_name, local_device())
    for name, rate in ((str(dtype)[6:], statistics.median(matmul)), ("bfloat16", matmul_rate(torch.bfloat16, local_device()))):
        console.print(f"megatron_ext: {achieved:.4f} TFLOP/s, {achieved / rate:.0%} of a {name} matrix product here ({rate:.4f} TFLOP/s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--lengths", type=Path, help=".npz file with an array `lengths`, tokens of each document")
    source.add_argument(
        "--corpus", default="runs/quickstart/data/prose.train_text_document", help=".bin/.idx pair whose document lengths are used"
    )
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--sequence-length", type=int, default=2048, help="longer documents are cut")
    parser.add_argument("--tokens-per-step", type=int, default=16384)
    parser.add_argument("--tokens-per-pack", type=int, default=2048, help="most tokens of a pack, and of a padded batch")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: all)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto")
    arguments = parser.parse_args()

    dtype, why = choose_dtype(arguments.dtype, local_device())
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(f"{dtype} ({why}), {torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}")
    config = ModelConfig(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.hidden_size * 11 // 4,
        num_layers=arguments.layers,
        num_heads=max(1, arguments.hidden_size // 64),
        num_kv_heads=max(1, arguments.hidden_size // 128),
        head_dim=64,
        max_position=arguments.sequence_length,
    )
    setting = Setting(config, arguments.dtype, arguments.threads, arguments.tokens_per_pack)
    steps = read_documents(arguments, np.random.default_rng(0))
    report(*measure(setting, steps, arguments.rounds), setting, steps)


if __name__ == "__main__":
    main()
