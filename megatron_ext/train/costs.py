"""The cost model of a run: read from a file, or roughly from the shape of the model."""

import os
from dataclasses import dataclass, replace

import torch

from megatron_ext.errors import ConfigError
from megatron_ext.parallel.grid import GridShape
from megatron_ext.planning.cost_file import load_cost_model
from megatron_ext.planning.cost_model import AttentionShape, CostModel, Curve
from megatron_ext.train.build import Setup


@dataclass(frozen=True)
class Machine:
    """Round numbers of a kind of machine: good enough to rank plans by, not to predict seconds."""

    flops: float
    """Of one rank, a second."""
    latency: float
    """Seconds before a message of two ranks of a host begins to flow; across hosts five times as many."""
    inside: float
    """Bytes a second that a rank sends to others of its host."""
    across: float
    """Bytes a second that a rank sends to other hosts."""
    per_layer: float
    """Seconds that a layer takes however few tokens there are."""


GPU = Machine(flops=4e14, latency=2e-5, inside=1.5e11, across=2.5e10, per_layer=1e-3)
CPU = Machine(flops=3e10, latency=1e-4, inside=1e9, across=1e8, per_layer=1e-3)


def cost_model(setup: Setup, shape: GridShape, device: torch.device, dtype: torch.dtype) -> tuple[CostModel, str]:
    """Costs of packs on one data rank's share of the grid, and where they are from.

    Raises:
        ConfigError: ``planning.cost_model`` cannot be read, or is of another model or grid.
    """
    path = setup.config.planning.cost_model
    attention = attention_shape(setup, shape, dtype)
    if path is not None:
        cost = load_cost_model(path)
        if cost.attention != attention:
            raise ConfigError(
                f"planning.cost_model {path} was measured for {cost.attention}; this run has {attention}: calibrate for this model"
            )
        return replace(cost, tokens_per_rank=setup.tokens_per_pack), path
    machine, name = (GPU, "GPU") if device.type == "cuda" else (CPU, "CPU")
    model, parts = setup.model, shape.tp * shape.pp
    flops = model.flops_per_token(0.0)
    # A document of s tokens has a mean context of s / 2.
    squared = (model.flops_per_token(1.0) - flops) / 2
    local = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
    curves = tuple(
        Curve.line(machine.latency, machine.inside) if degree * shape.tp <= local else Curve.line(5 * machine.latency, machine.across)
        for degree in (2**power for power in range(1, max(1, shape.dp.bit_length())))
    )
    cost = CostModel(
        tokens_per_rank=setup.tokens_per_pack,
        per_token=flops / parts / machine.flops,
        per_token_squared=squared / parts / machine.flops,
        per_pack=attention.layers * machine.per_layer,
        attention=attention,
        all_to_all=curves,
        ring_step=curves[-1] if curves else Curve(),
    )
    return cost, f"assumed for a {name}; tools/calibrate.py measures this machine"


def attention_shape(setup: Setup, shape: GridShape, dtype: torch.dtype) -> AttentionShape:
    """What one rank of the grid exchanges when it shares a pack."""
    model = setup.model
    return AttentionShape(
        layers=-(-model.num_layers // shape.pp),
        query_heads=model.num_heads // shape.tp,
        kv_heads=max(1, model.num_kv_heads // shape.tp),
        head_dim=model.head_dim,
        element_bytes=dtype.itemsize,
        forwards=1 if setup.config.train.activation_checkpointing == "none" else 2,
    )
