"""What a run is, in the lines that it begins with."""

from dataclasses import asdict

import torch

from megatron_ext.checkpoint.options import CheckpointOptions
from megatron_ext.model.gpt import parameter_shapes
from megatron_ext.optim.main_gradients import main_dtype
from megatron_ext.optim.routing import summarize_routes
from megatron_ext.parallel.device import describe
from megatron_ext.parallel.grid import Grid
from megatron_ext.train.build import Setup
from megatron_ext.train.saving import is_asynchronous


def describe_run(setup: Setup, grid: Grid, dtype: torch.dtype) -> dict[str, str]:
    """Names and values: ranks, size, update rules, steps and data. ``dtype`` is that of the parameters."""
    config, shape = setup.config, grid.shape
    parameters = setup.model.num_parameters()
    masters = str(main_dtype(dtype)).removeprefix("torch.")
    sharding = f"{config.optimizer.sharding}, each rank about {parameters // shape.size:,} parameters"
    sources = zip(setup.mixture.corpora, setup.mixture.expected_tokens(setup.token_budget), strict=True)
    packs = f"packs of {setup.tokens_per_pack:,}, {config.planning.policy}"
    return {
        "ranks": f"{shape.size}: {shape}, {describe(grid.world.device)}",
        "parameters": f"{parameters:,}",
        "optimizer": f"{config.optimizer.rule} on {masters} masters, {sharding}",
        **_describe_rules(setup, grid),
        **_describe_methods(setup),
        "step": f"{config.data.tokens_per_step:,} tokens at most; {packs}",
        "budget": f"{setup.total_steps:,} steps, {setup.token_budget:,} tokens",
        "checkpoints": _describe_saving(config.checkpoint, grid),
        "data": ", ".join(f"{each.name} {tokens / setup.token_budget:.1%} ({each.num_tokens:,} tokens)" for each, tokens in sources),
        **{f"  stage {number}": line for number, line in enumerate(describe_stages(setup)) if len(setup.mixture.stages) > 1},
    }


def _describe_saving(options: CheckpointOptions, grid: Grid) -> str:
    """When checkpoints are written, what is kept of them, and whether training waits."""
    when = "at the end" if options.every is None else f"every {options.every} steps"
    kept = f"the newest {options.keep_last} kept" + (f", those of every {options.keep_every} steps for good" if options.keep_every else "")
    waits = "copied, and written while training goes on" if is_asynchronous(options, grid.world.device) else "training waits for them"
    return f"{when}, {kept}; {waits}"


def _describe_methods(setup: Setup) -> dict[str, str]:
    """What changes updates, the loss or its weights."""
    options = setup.config.optimizer
    on = {f"optimizer.{key}": getattr(options, key) for key in options.methods}
    on |= {key: getattr(setup.config, key) for key in ("distillation", "loss_weighting") if getattr(setup.config, key) is not None}
    lines = [f"{key} {asdict(value)}" for key, value in on.items()]
    lines += [f"weights of the losses of {corpus.name}" for corpus in setup.mixture.corpora if corpus.options.is_weighted]
    return {"methods": "; ".join(lines)} if lines else {}


def describe_stages(setup: Setup) -> list[str]:
    """For each stage, where it begins, its sequence length, and the shares of its tokens within the budget of the run if steps are full."""
    mixture = setup.mixture
    ends = [*(stage.begin for stage in mixture.stages[1:]), setup.token_budget]
    lines = []
    for stage, end in zip(mixture.stages, ends, strict=True):
        tokens = min(end, setup.token_budget) - stage.begin
        line = f"from {stage.where}: sequences of {stage.sequence_length:,}{'' if stage.metadata else ' without metadata'}"
        if tokens <= 0:
            lines.append(f"{line}, which the run does not reach")
            continue
        amounts = [stage.shares.amount(source, stage.begin, stage.begin + tokens) for source in range(len(mixture.corpora))]
        shares = zip(mixture.corpora, amounts, strict=True)
        lines.append(f"{line}, " + ", ".join(f"{corpus.name} {amount / tokens:.1%}" for corpus, amount in shares))
    return lines


def _describe_rules(setup: Setup, grid: Grid) -> dict[str, str]:
    """Which rule updates what, and whether it sees whole matrices."""
    options = setup.config.optimizer
    rows = {f"  {each.rule}": str(each) for each in summarize_routes(setup.routes, parameter_shapes(setup.model))}
    if options.rules & {"muon", "normuon"} and options.muon.tp_mode == "blockwise" and grid.shape.tp > 1:
        rows["  blockwise"] = f"each of the {grid.shape.tp} parts of a matrix is orthogonalized by itself, which changes the result"
    return rows
