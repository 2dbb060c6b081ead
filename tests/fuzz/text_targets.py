"""Configuration, studies, and what reports read."""

import json
from pathlib import Path
from random import Random

import numpy as np
import yaml

from megatron_ext.config import dump_config, load_config
from megatron_ext.config.study import plan_runs, read_study
from megatron_ext.errors import ConfigError
from megatron_ext.planning.cost_file import cost_from_json, cost_to_json, load_cost_model
from megatron_ext.planning.plan import Pack, Plan, Slice
from megatron_ext.report.events import latest_events
from megatron_ext.report.metrics import read_run
from megatron_ext.report.mixture_points import read_mixture_table
from tests.fuzz.mutations import BYTES, VALUES, mutate_bytes, mutate_json, mutate_json_lines, mutate_table, mutate_yaml
from tests.fuzz.target import Target

CONFIG = {
    "run_dir": "runs/x",
    "seed": 3,
    "model": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "rope": {"kind": "linear", "factor": 2.0},
    },
    "data": {
        "sources": [{"name": "a", "path": "data/a", "weight": 2.0}, {"name": "b", "path": "data/b", "max_epochs": 3.0}],
        "replay": {"share": 0.2, "sources": [{"name": "c", "path": "data/c"}]},
        "sequence_length": 32,
        "tokens_per_step": 256,
        "validation_fraction": 0.1,
    },
    "parallel": {"tp": 2},
    "planning": {"policy": "adaptive"},
    "precision": {"recipe": "bf16"},
    "optimizer": {"rule": "adamw", "lr": 3e-4, "betas": [0.9, 0.95]},
    "schedule": {"warmup_steps": 2},
    "train": {"tokens": 2048, "dtype": "float32"},
    "evaluation": {"tokens": 256, "position_buckets": [8, 16]},
    "logging": {"every": 1},
    "checkpoint": {"every": 3},
    "deepspeed": {"wall_clock_breakdown": False},
}
OVERRIDES = ("optimizer.lr=1e-3", "data.sources.0.weight=3", "model.rope=null", "train.steps=4", "data.validation=[{name: v, path: x}]")


def _make_config(folder: Path) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG), "utf-8")


def _load_config(folder: Path, random: Random) -> None:
    overrides = [_override(random) for _ in range(random.randrange(3))]
    try:
        config = load_config(folder / "config.yaml", overrides)
    except ConfigError as error:
        if overrides and "command line" in str(error):
            raise ConfigError(f"{folder}: {error}") from error
        raise
    (folder / "again.yaml").write_text(dump_config(config), "utf-8")
    assert load_config(folder / "again.yaml") == config


def _override(random: Random) -> str:
    text = random.choice(OVERRIDES)
    if random.random() < 0.3:
        path, _, _ = text.partition("=")
        return f"{path}={random.choice(VALUES)!r:.400}"
    if random.random() < 0.5:
        at = random.randrange(len(text))
        return text[:at] + random.choice((".", "=", "", "[", "{", "\0", "-1", "9" * 30, "&a *a", "é")) + text[at + 1 :]
    return text


CONFIG_TARGET = Target(_make_config, {"config.yaml": mutate_yaml}, _load_config)

STUDY = {
    "title": "Rates",
    "config": "config.yaml",
    "overrides": ["data.replay=null"],
    "prepare": "make data",
    "quantization": {"schemes": ["int4"], "tokens": 64},
    "seeds": [1],
    "variants": {"one": {"sweep": {"optimizer.lr": [1e-3, 2e-3]}}, "two": {"overrides": ["optimizer.weight_decay=0.0"]}},
}


def _make_study(folder: Path) -> None:
    _make_config(folder)
    values = {**STUDY, "config": str(folder / "config.yaml")}
    values["overrides"] = ["data.replay=null", "data.validation=[{name: v, path: x}]", "data.validation_fraction=0.0"]
    (folder / "study.yaml").write_text(yaml.safe_dump(values), "utf-8")


def _load_study(folder: Path, random: Random) -> None:
    path = folder / "study.yaml"
    study = read_study(path)
    if len(study.seeds) * sum(len(variant.swept_values) for variant in study.variants.values()) <= 4:
        assert len({run.directory for run in plan_runs(path, study, folder / "out")}) > 0


STUDY_TARGET = Target(_make_study, {"study.yaml": mutate_yaml}, _load_study)

METRICS = (
    {"kind": "start", "time": 1.0, "step": 0, "run": "x", "ranks": 2, "unigram_entropy": {"a": 1.0}, "versions": {"torch": "2"}},
    {
        "kind": "eval",
        "time": 1.5,
        "step": 0,
        "tokens": 0,
        "source": "a",
        "loss": 3.0,
        "by_position": [{"start": 0, "stop": None, "loss": 1.0, "tokens": 3}],
    },
    {
        "kind": "train",
        "time": 2.0,
        "step": 1,
        "tokens": 9,
        "loss": 2.5,
        "tokens_by_source": {"a": 9},
        "lr": 0.1,
        "length_histogram": {"8": 1},
    },
    {
        "kind": "plan",
        "time": 2.0,
        "step": 1,
        "devices": 2,
        "in_rounds": False,
        "seconds": 1.0,
        "bound": 0.5,
        "packs": [[0, 2, 1, 9, 1, 0.0, 1.0]],
    },
    {"kind": "probe", "time": 2.0, "step": 1, "tokens": 9, "widths": {"q": 4}, "sites": {"q": {"variance": [1.0, 2.0]}}},
    {
        "kind": "needle",
        "time": 2.0,
        "step": 1,
        "tokens": 9,
        "lengths": [8],
        "depths": [0.5],
        "samples": 1,
        "exact": [[1.0]],
        "log_probability": [[-1.0]],
    },
    {"kind": "event", "time": 2.5, "step": 1, "event": "checkpoint"},
    {"kind": "train", "time": 3.0, "step": 2, "tokens": 18, "loss": 2.4, "tokens_by_source": {"a": 18}, "tokens_by_degree": {"2": 9}},
)


def _make_metrics(folder: Path) -> None:
    _make_config(folder)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in METRICS), "utf-8")


def _make_events(folder: Path) -> None:
    _make_metrics(folder)
    events = ({"kind": "event", "time": 1.0 + step, "step": step, "event": name} for step, name in enumerate(("start", "save", "restart")))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), "utf-8")


def _load_events(folder: Path, random: Random) -> None:
    latest, run = latest_events(folder), read_run(folder)
    assert all(isinstance(event.event, str) and isinstance(event.step, int) for event in [*latest, *run.events])


def _load_metrics(folder: Path, random: Random) -> None:
    run = read_run(folder)
    assert run.tokens >= 0 or run.train or run.evals
    _ = run.length_histogram, run.skipped, run.epochs, run.sources, run.column("loss"), run.name
    assert [record.step for record in run.train] == sorted({record.step for record in run.train})


EVENTS_TARGET = Target(_make_events, {"events.jsonl": mutate_json_lines, "metrics.jsonl": mutate_json_lines}, _load_events)
METRICS_TARGET = Target(_make_metrics, {"metrics.jsonl": mutate_json_lines, "config.yaml": mutate_yaml}, _load_metrics)


def _make_table(folder: Path) -> None:
    rows = [f"{share},{tokens},{3 - share * tokens / 200},{2 + share},{share}" for share in (0.0, 0.1, 0.2) for tokens in (0, 100, 200)]
    (folder / "points.csv").write_text("\n".join(["share,tokens,general_loss,domain_loss,run", *rows, ""]), "utf-8")


def _load_table(folder: Path, random: Random) -> None:
    runs = read_mixture_table(folder / "points.csv")
    assert np.isfinite(runs.general).all() and ((runs.share >= 0) & (runs.share <= 1)).all() and (runs.tokens > 0).all()


def _mutate_table(random: Random, content: bytes) -> bytes:
    return mutate_table(random, content) if random.random() < 0.8 else mutate_table(random, content + random.choice(BYTES))


TABLE_TARGET = Target(_make_table, {"points.csv": _mutate_table}, _load_table)

COSTS = {
    "format": 1,
    "tokens_per_rank": 1024,
    "per_pack": 1e-3,
    "attention": {"layers": 2, "query_heads": 4},
    "all_to_all": [{"bytes": [0.0, 1024.0], "seconds": [1e-5, 2e-5]}],
    "ring_step": {"bytes": [0.0, 1024.0], "seconds": [1e-5, 2e-5]},
    "efficiency": [0.5, 1.0],
    "efficiency_tokens": [64, 1024],
}


def _make_costs(folder: Path) -> None:
    (folder / "costs.json").write_text(json.dumps(COSTS), "utf-8")


def _load_costs(folder: Path, random: Random) -> None:
    cost = load_cost_model(str(folder / "costs.json"))
    assert cost_from_json(json.loads(json.dumps(cost_to_json(cost))), "again") == cost


COSTS_TARGET = Target(_make_costs, {"costs.json": mutate_json}, _load_costs)

LENGTHS = (40, 7, 100, 3, 64)


def _make_plan(folder: Path) -> None:
    blocks = ((0, 2, 1, (2,)), (2, 1, 1, (0, 1, 3)), (3, 1, 1, (4,)))
    packs = [
        Pack(first, degree, tuple(Slice(number, 0, LENGTHS[number]) for number in numbers), ring) for first, degree, ring, numbers in blocks
    ]
    plan = Plan(4, tuple(packs), in_rounds=True)
    (folder / "plan.bin").write_bytes(plan.encode().tobytes())


def _load_plan(folder: Path, random: Random) -> None:
    try:
        content = (folder / "plan.bin").read_bytes()
    except OSError:
        return
    encoded = np.frombuffer(content[: len(content) // 4 * 4], "<i4")
    try:
        plan = Plan.decode(encoded)
        plan.validate(LENGTHS, 64)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error
    assert np.array_equal(plan.encode(), encoded)
    seen = sorted((piece.document, piece.start, piece.stop) for pack in plan.packs for piece in pack.slices)
    assert sum(stop - start for _, start, stop in seen) == sum(LENGTHS)


PLAN_TARGET = Target(_make_plan, {"plan.bin": mutate_bytes}, _load_plan)
