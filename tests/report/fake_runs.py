"""Makes run directories with plausible records, as a training run would leave them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

TOKENS_PER_STEP = 8192
UNIGRAM_ENTROPY = {"prose": 6.41, "code": 5.63}


def write_run(directory: Path, records: list[Any], torn: str = "", config: Any = None) -> Path:
    """Write config.yaml and one JSON line a record (a str stands for itself), then ``torn`` without a newline."""
    directory.mkdir(parents=True)
    config = {"run": directory.name, "model": {"num_layers": 4}} if config is None else config
    (directory / "config.yaml").write_text(yaml.safe_dump(config), "utf-8")
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (directory / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines) + torn, "utf-8")
    return directory


def start(run: str = "pretrain", **changes: Any) -> dict[str, Any]:
    record = {"kind": "start", "time": 1.7e9, "step": 0, "tokens": 0, "run": run, "ranks": 2, "parameters": 2_243_840, "total_steps": 100}
    record |= {"tokens_per_step": TOKENS_PER_STEP, "device": "cpu", "dtype": "float32", "attention": "sdpa"}
    return record | {"unigram_entropy": UNIGRAM_ENTROPY, "versions": {"torch": "2.13.0", "deepspeed": "0.19.8"}} | changes


def train(step: int, loss: float = 5.0, **changes: Any) -> dict[str, Any]:
    tokens = step * TOKENS_PER_STEP
    record = {"kind": "train", "time": 1.7e9 + 2 * step, "step": step, "tokens": tokens, "loss": loss, "loss_by_source": {"prose": loss}}
    record |= {"tokens_by_source": {"prose": tokens}, "lr": 3e-4, "grad_norm": 1.5, "tokens_per_second": 4096.0, "tflops": 0.05}
    record |= {"memory_gib": 0.9, "step_seconds": 2.0, "packs": 4, "pack_fill": 0.97, "length_histogram": {"64": 3, "128": 10, "256": 2}}
    return record | {"skipped_steps": 0, "epochs": {"prose": 0.01 * step}} | changes


def shared(step: int, **changes: Any) -> dict[str, Any]:
    """A step whose ranks shared packs."""
    record = {"plan_policy": "adaptive", "plan_seconds": 1.5, "plan_gap": 0.02, "planning_seconds": 0.01, "plan_stall_seconds": 0.001}
    return train(step) | record | {"exchange_seconds": 0.25, "tokens_by_degree": {"1": 2048, "4": 6144}} | changes


def plan(step: int, packs: list[list[float]], **changes: Any) -> dict[str, Any]:
    """A plan; packs are [first rank, degree, ring, tokens, documents, begin, end]."""
    seconds = max((pack[6] for pack in packs), default=0.0)
    record = {"kind": "plan", "time": 1.7e9 + 2 * step, "step": step, "devices": 4, "in_rounds": False}
    return record | {"seconds": seconds, "bound": 0.75 * seconds, "packs": packs} | changes


def packs_of_all_degrees(devices: int, seed: int) -> list[list[float]]:
    """Packs on aligned blocks of 1, 1, 2, 4, 8 ... ranks, and then one on each rank."""
    random = np.random.default_rng(seed)
    free, packs, first = np.zeros(devices), [], 0
    while first < devices:
        degree = min(first & -first or 1, 1 << ((devices - first).bit_length() - 1))
        free[first : first + degree] = random.uniform(0.5, 1.0)
        packs.append([first, degree, 1, 8192 * degree, 5, 0.0, free[first]])
        first += degree
    for rank in range(devices):
        packs.append([rank, 1, 1, 4096, 40, free[rank], free[rank] + random.uniform(0.2, 0.4)])
    return packs


def evaluation(step: int, source: str, loss: float, **changes: Any) -> dict[str, Any]:
    record = {"kind": "eval", "time": 1.7e9 + 2 * step, "step": step, "tokens": step * TOKENS_PER_STEP, "source": source}
    return record | {"split": "validation", "loss": loss, "eval_tokens": 65536} | changes


def realistic_run(
    directory: Path,
    run: str,
    steps: int,
    curves: Mapping[str, Callable[[float], float]],
    shares: Mapping[str, float],
    lengths: tuple[float, float],
    seed: int,
    begin: float = 1.7e9,
) -> Path:
    """A whole phase: ``curves`` give each source's loss by progress in [0, 1], ``shares`` the mixture, ``lengths`` a log2 normal."""
    random = np.random.default_rng(seed)
    records: list[dict[str, Any]] = [start(run, time=begin, total_steps=steps)]
    skipped = 0
    for step in range(steps + 1):
        progress, time = step / steps, begin + 1.8 * step
        if step:
            skipped += step == steps // 3
            records.append(_realistic_step(step, progress, time, curves, shares, lengths, skipped, random))
        if step % max(1, steps // 8) == 0 or step == steps:
            records += [evaluation(step, source, curve(progress), time=time) for source, curve in curves.items()]
        if step and step % max(1, steps // 2) == 0:
            records.append({"kind": "event", "event": "save", "time": time, "step": step})
    return write_run(directory, records)


def _realistic_step(
    step: int,
    progress: float,
    time: float,
    curves: Mapping[str, Callable[[float], float]],
    shares: Mapping[str, float],
    lengths: tuple[float, float],
    skipped: int,
    random: np.random.Generator,
) -> dict[str, Any]:
    losses = {source: curves[source](progress) + 0.12 * random.standard_normal() for source in shares}
    keys, counts = np.unique(2 ** np.clip(np.ceil(random.normal(*lengths, size=20)), 4, 12).astype(int), return_counts=True)
    warmup = min(1.0, step / 20)
    return train(
        step,
        loss=sum(losses[source] * share for source, share in shares.items()),
        time=time,
        loss_by_source=losses,
        tokens_by_source={source: int(TOKENS_PER_STEP * share) * step for source, share in shares.items()},
        lr=3e-3 * warmup * (0.55 + 0.45 * np.cos(np.pi * progress)),
        grad_norm=float(np.exp(random.normal(0.9 - progress, 0.3))),
        tokens_per_second=float(random.normal(4700, 160)),
        step_seconds=float(abs(random.normal(1.75, 0.08))),
        pack_fill=float(min(1.0, random.normal(0.95, 0.03))),
        length_histogram={str(key): int(count) for key, count in zip(keys, counts, strict=True)},
        skipped_steps=skipped,
        epochs={source: 1.4 * progress * share for source, share in shares.items()},
    )


def three_runs(directory: Path) -> dict[str, Path]:
    """Pretraining on prose, continuation on code with replay of prose, and the same without replay as a control."""
    falling = {"prose": lambda x: 4.25 + 4.9 * np.exp(-9 * x), "code": lambda x: 5.35 + 3.8 * np.exp(-8 * x)}
    prose, code = falling["prose"](1.0), falling["code"](1.0)
    learned = {"prose": lambda x: prose * (1 + 0.018 * min(1, 6 * x)), "code": lambda x: 3.42 + (code - 3.42) * np.exp(-7 * x)}
    forgot = {"prose": lambda x: prose * (1 + 0.21 * (1 - np.exp(-5 * x))), "code": lambda x: 3.36 + (code - 3.36) * np.exp(-7.5 * x)}
    long = (9.5, 1.4)
    mixture = {"code": 0.75, "prose": 0.25}
    return {
        "pretrain": realistic_run(directory / "pretrain", "pretrain", 120, falling, {"prose": 1.0}, (7.2, 1.3), seed=1),
        "continual": realistic_run(directory / "continual", "continual", 90, learned, mixture, long, seed=2, begin=1.7e9 + 400),
        "no_replay": realistic_run(directory / "no_replay", "continual", 90, forgot, {"code": 1.0}, long, seed=3, begin=1.7e9 + 900),
    }


def probe(step: int, layers: int = 4, width: int = 512, outlier: float = 0.0, **changes: Any) -> dict[str, Any]:
    """A step that was looked into: kurtosis rises with depth, and in the residual stream by ``outlier``."""
    random, sites = np.random.default_rng(step), {}
    widths = {"residual": width, "input_layernorm": width, "post_attention_layernorm": width, "q": width, "k": width // 4, "v": width // 4}
    widths |= {"attention_output": width, "down_proj_input": 3 * width}
    for number, site in enumerate(widths):
        depth = np.arange(layers + (site == "residual"))
        kurtosis = (0.05 + (outlier if site == "residual" else 0.02 * number)) * (1 + depth) * random.uniform(0.9, 1.1, len(depth))
        sites[site] = {"kurtosis_released": kurtosis.tolist(), "kurtosis_centred": (kurtosis - 0.1).tolist()}
        sites[site] |= {"max_to_mean": (3 + kurtosis).tolist(), "variance": (0.01 * 2.0**depth).tolist()}
        sites[site] |= {"top_channel_share": np.minimum(0.9, 0.01 + 0.05 * kurtosis).tolist()}
    floors = {site: {"kurtosis_released": 0.4 * (24 / each) ** 0.5, "kurtosis_centred": -6 / (each + 1)} for site, each in widths.items()}
    record = {"kind": "probe", "time": 1.7e9 + 2 * step, "step": step, "tokens": step * TOKENS_PER_STEP, "widths": widths}
    record |= {"sites": sites, "floors": floors, "gradient_norm": (0.3 * 0.8 ** np.arange(layers + 1)).tolist()}
    record |= {"parameter_gradient_norm": (0.2 * 0.9 ** np.arange(layers)).tolist()}
    record |= {"sink_mass": np.linspace(0.1, 0.4, layers).tolist(), "sink_mass_uniform": 0.05, "max_logit": list(range(2, 2 + layers))}
    return record | changes
