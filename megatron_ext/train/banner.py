"""What a run is, in the lines that it begins with."""

import torch

from megatron_ext.model.gpt import parameter_shapes
from megatron_ext.optim.main_gradients import main_dtype
from megatron_ext.optim.routing import summarize_routes
from megatron_ext.parallel.device import describe
from megatron_ext.parallel.grid import Grid
from megatron_ext.train.build import Setup


def describe_run(setup: Setup, grid: Grid, dtype: torch.dtype) -> dict[str, str]:
    """Names and values: ranks, size, update rules, steps and data. ``dtype`` is that of the parameters."""
    config, shape = setup.config, grid.shape
    parameters = setup.model.num_parameters()
    masters = str(main_dtype(dtype)).removeprefix("torch.")
    sharding = f"{config.optimizer.sharding}, each rank about {parameters // shape.size:,} parameters"
    shares = zip(setup.mixture.corpora, setup.mixture.shares, strict=True)
    packs = f"packs of {setup.tokens_per_pack:,}, {config.planning.policy}"
    return {
        "ranks": f"{shape.size}: {shape}, {describe(grid.world.device)}",
        "parameters": f"{parameters:,}",
        "optimizer": f"{config.optimizer.rule} on {masters} masters, {sharding}",
        **_describe_rules(setup, grid),
        "step": f"{config.data.tokens_per_step:,} tokens at most; {packs}",
        "budget": f"{setup.total_steps:,} steps, {setup.token_budget:,} tokens",
        "data": ", ".join(f"{corpus.name} {share:.1%} ({corpus.dataset.num_tokens:,} tokens)" for corpus, share in shares),
    }


def _describe_rules(setup: Setup, grid: Grid) -> dict[str, str]:
    """Which rule updates what, and whether it sees whole matrices."""
    options = setup.config.optimizer
    rows = {f"  {each.rule}": str(each) for each in summarize_routes(setup.routes, parameter_shapes(setup.model))}
    if options.rules & {"muon", "normuon"} and options.muon.tp_mode == "blockwise" and grid.shape.tp > 1:
        rows["  blockwise"] = f"each of the {grid.shape.tp} parts of a matrix is orthogonalized by itself, which changes the result"
    return rows
