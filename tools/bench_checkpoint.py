"""From a running training on two ranks to a state that one rank can resume from: our checkpoint beside DeepSpeed's universal one.

    python tools/bench_checkpoint.py --parameters 85000000

  megatron_ext   save (it is resumable on any grid as it lies), load on one rank
  deepspeed      save_checkpoint under ZeRO-1, ds_to_universal, load on one rank with load_universal

  stall          how long training waits for a save: ours that it waits for, ours in the background (copies are taken), and
                 torch.distributed.checkpoint's async_save of the parameters and moments that each rank owns

All hold float32 parameters and AdamW's moments: 12 bytes a parameter. Files are hashed on our side, as in every save and load.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from bench_ranks import Ranks, State, print_ratios
from rich.console import Console
from rich.table import Table

from megatron_ext.checkpoint.background import BackgroundSave
from megatron_ext.checkpoint.hf_config import config_to_hf
from megatron_ext.checkpoint.load import load_optimizer, verify
from megatron_ext.checkpoint.save import CheckpointWriter
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.optim.adamw import AdamW, decay_groups
from megatron_ext.optim.options import OptimizerOptions
from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.world import World
from megatron_ext.train.build import build_optimizer
from megatron_ext.train.deepspeed_setup import join_deepspeed


def model_of(parameters: int) -> ModelConfig:
    """A Llama of about so many parameters."""
    hidden = 512
    block = 4 * hidden**2 + 3 * hidden * 1408
    return ModelConfig(8192, hidden, 1408, max(1, (parameters - 2 * 8192 * hidden) // block), 8, 8, 64, 1024)


def give_gradients(model: GPT) -> None:
    torch.stack([parameter.square().mean() for parameter in model.parameters()]).sum().backward()


def set_up_ours(world: World, state: State, config: ModelConfig) -> None:
    state["model"] = GPT(config)
    state["model"].reset_parameters(0)
    state["grid"] = Grid(world, GridShape(1, world.size, 1))
    state["optimizer"] = build_optimizer(state["model"], OptimizerOptions(), state["grid"])
    give_gradients(state["model"])
    state["optimizer"].step()


def save_ours(world: World, state: State, folder: Path, config: ModelConfig) -> float:
    """Seconds of a save that training waits for."""
    begin = time.perf_counter()
    writer_of(state, folder, config).save(1, dict(state["model"].named_parameters()).__getitem__, state["optimizer"], {})
    return time.perf_counter() - begin


def stall_ours(world: World, state: State, folder: Path, config: ModelConfig) -> float:
    """Seconds that training waits for a save in the background; then waits for its end, outside of the time."""
    world.barrier()
    begin = time.perf_counter()
    writer = writer_of(state, folder, config)
    job = writer.begin(1, dict(state["model"].named_parameters()).__getitem__, state["optimizer"], {}, copied=True)
    with ThreadPoolExecutor(1) as thread:
        pending = BackgroundSave(writer, job, thread)
        seconds = time.perf_counter() - begin
        pending.wait()
    return seconds


def stall_torch(world: World, state: State, folder: Path) -> float:
    """As ``stall_ours``, by torch.distributed.checkpoint: parameters, masters and moments under names that no two ranks share."""
    if "gloo" not in state:
        state["gloo"] = dist.new_group(backend="gloo")
    values = {f"{part}|{kind}": value for part, kinds in state["optimizer"].owned_state() for kind, value in kinds.items()}
    if world.is_main:
        values |= {name: parameter.detach() for name, parameter in state["model"].named_parameters()}
    world.barrier()
    begin = time.perf_counter()
    future = dcp.async_save(values, checkpoint_id=str(folder), process_group=state["gloo"])
    seconds = time.perf_counter() - begin
    future.result()
    return seconds


def writer_of(state: State, folder: Path, config: ModelConfig) -> CheckpointWriter:
    return CheckpointWriter(folder, state["grid"], config_to_hf(config, dtype="float32"), lambda directory: None, 1, 4 * 2**30)


def load_ours(world: World, state: State, folder: Path) -> float:
    """Seconds of a load, with the check of every file's hash."""
    begin = time.perf_counter()
    verify(folder / "step_00000001", world)
    load_optimizer(folder / "step_00000001", state["optimizer"], world)
    return time.perf_counter() - begin


def set_up_theirs(world: World, state: State, config: ModelConfig, universal: bool) -> None:
    join_deepspeed(world)
    model = GPT(config)
    model.reset_parameters(0)
    settings = {
        "train_batch_size": world.size,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
        "checkpoint": {"load_universal": universal},
    }
    rule = AdamW(decay_groups(model.named_parameters(), 0.1))
    engine, *_ = deepspeed.initialize(model=model, optimizer=rule, config=settings, dist_init_required=False)
    state["engine"] = engine
    if not universal:
        ids = torch.zeros(8, dtype=torch.int64)
        loss, _ = engine(ids, ids, torch.tensor([0, 8], dtype=torch.int32), 8, ids, torch.ones(8))
        engine.backward(loss)
        engine.step()


def save_theirs(world: World, state: State, folder: Path) -> float:
    """Seconds of a save."""
    begin = time.perf_counter()
    state["engine"].save_checkpoint(str(folder), tag="step")
    return time.perf_counter() - begin


def convert_theirs(folder: Path) -> float:
    """Seconds of the conversion that another number of ranks needs."""
    begin = time.perf_counter()
    module = ["-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    folders = ["--input_folder", str(folder / "step"), "--output_folder", str(folder / "universal")]
    done = subprocess.run([sys.executable, *module, *folders], capture_output=True, text=True, cwd=folder)
    if done.returncode:
        sys.exit(f"ds_to_universal failed:\n{done.stdout}\n{done.stderr}")
    return time.perf_counter() - begin


def load_theirs(world: World, state: State, folder: Path) -> float:
    """Seconds of a load."""
    begin = time.perf_counter()
    state["engine"].load_checkpoint(str(folder), tag="universal")
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=85_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary directory)")
    arguments = parser.parse_args()
    config = model_of(arguments.parameters)
    pools = {name: (Ranks(2), Ranks(1)) for name in ("megatron_ext", "deepspeed")}
    for ranks in pools["megatron_ext"]:
        ranks.run(set_up_ours, config)
    for ranks, universal in zip(pools["deepspeed"], (False, True), strict=True):
        ranks.run(set_up_theirs, config, universal)
    seconds: dict[str, list[list[float]]] = {name: [] for name in pools}
    stalls: dict[str, list[float]] = {name: [] for name in ("waited for", "in the background", "torch async_save")}
    for _ in range(arguments.rounds):
        folder = Path(tempfile.mkdtemp(dir=arguments.folder))
        many, one = pools["megatron_ext"]
        seconds["megatron_ext"].append([max(many.run(save_ours, folder / "a", config)), 0.0, max(one.run(load_ours, folder / "a"))])
        stalls["waited for"].append(seconds["megatron_ext"][-1][0])
        stalls["in the background"].append(max(many.run(stall_ours, folder / "c", config)))
        stalls["torch async_save"].append(max(many.run(stall_torch, folder / "d")))
        many, one = pools["deepspeed"]
        (folder / "b").mkdir()
        saved, converted = max(many.run(save_theirs, folder / "b")), convert_theirs(folder / "b")
        seconds["deepspeed"].append([saved, converted, max(one.run(load_theirs, folder / "b"))])
        shutil.rmtree(folder)
    for ranks in (ranks for both in pools.values() for ranks in both):
        ranks.close()
    report(seconds, config)
    print_ratios("training waits", "save", "in the background", stalls, "seconds", "less")


def report(seconds: dict[str, list[list[float]]], config: ModelConfig) -> None:
    """Print medians of each phase, and the ratios of the whole and of the way to a resumable checkpoint."""
    table = Table(title=f"{config.num_parameters():,} parameters, {12 * config.num_parameters() / 2**30:.2f} GiB of state")
    for heading in ("seconds (median)", "save", "convert", "load", "save + convert", "all"):
        table.add_column(heading)
    for name, rounds in seconds.items():
        phases = [statistics.median(each[phase] for each in rounds) for phase in range(3)]
        table.add_row(name, *(f"{value:.2f}" for value in (*phases, phases[0] + phases[1], sum(phases))))
    Console(width=110).print(table)
    for what, last in (("to a checkpoint that another grid can resume from", 2), ("until it has been loaded", 3)):
        pairs = zip(seconds["deepspeed"], seconds["megatron_ext"], strict=True)
        ratios = sorted(sum(theirs[:last]) / sum(ours[:last]) for theirs, ours in pairs)
        print(f"deepspeed / megatron_ext, {what}: min {ratios[0]:.2f}, median {statistics.median(ratios):.2f}, max {ratios[-1]:.2f}")


if __name__ == "__main__":
    main()
