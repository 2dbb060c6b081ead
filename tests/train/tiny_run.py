"""A run small enough for tests: random documents, a model of a few thousand parameters, float32 on the CPU."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from megatron_ext.config import RunConfig, load_config
from megatron_ext.data.indexed_writer import IndexedDatasetWriter
from megatron_ext.parallel.world import World
from megatron_ext.train.build import build_grid, prepare
from megatron_ext.train.trainer import Trainer

ROOT = Path(__file__).parents[2]
VOCAB = 64


def random_documents(count: int, longest: int, seed: int = 0, vocab: int = VOCAB) -> list[np.ndarray]:
    """``count`` documents of 1 to ``longest`` tokens; low ids are more frequent, so that there is something to learn."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest + 1, size=count)
    return [np.minimum(generator.geometric(0.1, size=length), vocab - 1).astype(np.uint16) for length in lengths]


def write_corpus(prefix: Path, documents: Sequence[np.ndarray], dtype: str = "uint16") -> str:
    """Write a .bin/.idx pair; returns its prefix."""
    with IndexedDatasetWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add(document)
    return str(prefix)


def write_run(folder: Path, **changes: Any) -> Path:
    """Two corpora and the configuration of a run over them in ``folder``/run; ``changes`` are dotted keys with __ for the dots."""
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "seed": 7,
        "model": {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2},
        "data": {
            "sources": [
                {"name": "prose", "path": write_corpus(folder / "prose", random_documents(60, 40, seed=1)), "weight": 2.0},
                {"name": "code", "path": write_corpus(folder / "code", random_documents(30, 120, seed=2))},
            ],
            "sequence_length": 32,
            "tokens_per_step": 256,
            "validation_fraction": 0.1,
        },
        "optimizer": {"lr": 0.01},
        "schedule": {"warmup_steps": 2},
        "train": {"steps": 8, "dtype": "float32", "threads_per_rank": 1},
        "evaluation": {"tokens": 256},
        "logging": {"every": 1, "tensorboard": False},
        "checkpoint": {"every": 3},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    return path


def train(world: World, config: Path, overrides: Sequence[str] = ()) -> None:
    """What ``pretrain`` does, on ranks that exist already."""
    train_config(world, load_config(config, list(overrides)))


def train_config(world: World, config: RunConfig) -> None:
    """As ``train``, for a configuration that was read."""
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    world.barrier()
    setup = prepare(config)
    Trainer(setup, build_grid(setup, world)).train()


def start(config: Path, *overrides: str, ranks: int = 1, script: Path = ROOT / "examples" / "pretrain.py") -> subprocess.Popen[str]:
    """The run as a user starts it: one process, or ``ranks`` of them through the deepspeed launcher."""
    arguments = [str(script), "--config", str(config), *overrides]
    launcher = [sys.executable]
    if ranks > 1:
        port = ["--master_port", str(29500 + os.getpid() % 2000)]
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(ranks), *port]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*launcher, *arguments], env=environment, cwd=ROOT, start_new_session=True, **pipes)


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Records of one kind from metrics.jsonl; of kind ``event`` from events.jsonl, without those that a later start undid."""
    lines = (run_dir / ("events.jsonl" if kind == "event" else "metrics.jsonl")).read_text("utf-8").splitlines()
    found = [record for record in map(json.loads, lines) if record["kind"] == kind]
    starts = {place: record["step"] for place, record in enumerate(found) if record.get("event") in ("start", "restart")}
    return [
        record
        for place, record in enumerate(found)
        if all(record["step"] <= step for later, step in starts.items() if kind == "event" and later > place)
    ]


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step, exactly as it was written."""
    return {record["step"]: record["loss"] for record in records(run_dir, "train")}


def master_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Master weights and moments of a checkpoint by parameter and kind, put together from the boxes of all ranks, without our reader."""
    from safetensors.torch import load_file

    parts = [(key, tensor) for file in sorted((checkpoint / "optimizer").glob("*.safetensors")) for key, tensor in load_file(file).items()]
    boxes: dict[str, list[tuple[list[list[int]], torch.Tensor]]] = {}
    for key, tensor in parts:
        name, kind, ranges = key.split("|")
        box = [[int(bound) for bound in bounds.split(":")] for bounds in ranges.split(",") if bounds]
        boxes.setdefault(f"{name}|{kind}", []).append((box, tensor))
    whole = {}
    for name, found in boxes.items():
        shape = [max(box[dimension][1] for box, _ in found) for dimension in range(len(found[0][0]))]
        whole[name] = torch.full(shape, float("nan"), dtype=found[0][1].dtype)
        for box, tensor in found:
            whole[name][tuple(slice(*bounds) for bounds in box)] = tensor
        assert not whole[name].isnan().any()
    return whole
