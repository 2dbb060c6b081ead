"""How large each output channel of the linears in blocks is, over the tokens of a step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ext.model.block import Block
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.parallel.tensor import ColumnLinear

COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWS = ("self_attn.o_proj", "mlp.down_proj")
"""Linears whose product is whole only behind the tensor-parallel region that they end."""


def output_widths(config: ModelConfig) -> dict[str, int]:
    """Output channels of the linears of a block, by name."""
    attention = dict(zip(COLUMNS[:3], (config.query_size, config.kv_size, config.kv_size), strict=True))
    return attention | dict.fromkeys(COLUMNS[3:], config.intermediate_size) | dict.fromkeys(ROWS, config.hidden_size)


class OutputMagnitudes:
    """Sums, over all tokens of training forward passes, of each output's share of its token's L1 norm: |h_i| / sum_j |h_j|.

    The magnitudes of MIGU (Du et al. 2024, arXiv:2406.17245, section 3), but for the number of tokens, which changes no order. What
    activation checkpointing computes again is not counted. With tensor-parallel ranks, sends 5 numbers of each token for every block.

    Args:
        model: this rank's part; it is watched from now on.
    """

    def __init__(self, model: GPT) -> None:
        widths = output_widths(model.config)
        names = [f"model.layers.{layer}.{linear}" for layer in range(model.config.num_layers) for linear in widths]
        sizes = list(widths.values()) * model.config.num_layers
        device = next(model.parameters()).device
        self._flat = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        self._sizes = dict(zip(names, sizes, strict=True))
        self._sums = dict(zip(names, self._flat.split(sizes), strict=True))
        for number, block in model.model.layers.items():
            _BlockWatch(block, {linear: self._sums[f"model.layers.{number}.{linear}"] for linear in widths})

    def take(self, over_ranks: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The sums since the last call, float64 [channels] on the CPU, by name of the linear.

        ``over_ranks`` adds up a tensor over all ranks: 8 bytes for every output channel of the whole model.
        """
        flat = over_ranks(self._flat.clone()).cpu()
        self._flat.zero_()
        return dict(zip(self._sizes, flat.split(list(self._sizes.values())), strict=True))


class _BlockWatch:
    """Adds what the linears of one block put out to ``sums``, when the block has returned; each channel of each token on one rank."""

    def __init__(self, block: Block, sums: dict[str, Tensor]) -> None:
        self._block, self._tp, self._sums = block, block.tp, sums
        self._seen: dict[str, list[Tensor]] | None = None
        """What modules put out since the model called the block; None: nobody called it, and what runs is computed again."""
        block.register_forward_pre_hook(self._begin)
        block.register_forward_hook(self._end)
        for name in COLUMNS:
            block.get_submodule(name).register_forward_hook(partial(self._made, name))
        for name in ROWS:
            block.get_submodule(name.partition(".")[0]).register_forward_hook(partial(self._made, name))

    def _made(self, name: str, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if self._seen is not None:
            self._seen.setdefault(name, []).append(output)

    def _begin(self, block: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._seen = {} if block.training else None

    @torch.no_grad()
    def _end(self, block: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        seen, self._seen = self._seen, None
        if seen is None:
            return
        made = {name: _wide(torch.cat(seen[name])).abs() for name in (*COLUMNS, *ROWS)}
        self._add_columns({name: made[name] for name in COLUMNS})
        # Without tokens divided over the ranks, every tensor-parallel rank has the same whole products.
        if self._tp.shard_tokens or self._tp.group.rank == 0:
            for name in ROWS:
                self._sums[name] += _shares(made[name], made[name].sum(1))

    def _add_columns(self, made: dict[str, Tensor]) -> None:
        """Channels divided over the ranks; of neighbours that hold the same ones, the first counts."""
        splits = {name: self._linear(name).split for name in made}
        counts = {name: self._tp.group.rank % split.copies == 0 for name, split in splits.items()}
        norms = torch.stack([x.sum(1) if counts[name] else torch.zeros_like(x[:, 0]) for name, x in made.items()])
        norms = self._tp.group.all_reduce(norms)
        for norm, (name, x) in zip(norms, made.items(), strict=True):
            if counts[name]:
                self._sums[name][splits[name].start : splits[name].stop] += _shares(x, norm)

    def _linear(self, name: str) -> ColumnLinear:
        linear = self._block.get_submodule(name)
        assert isinstance(linear, ColumnLinear), "the linears that begin a region"
        return linear


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _shares(x: Tensor, norms: Tensor) -> Tensor:
    """Sum over tokens of ``x`` [T, channels] over the norm of each token [T]; tokens of norm 0, which padding has, count nothing."""
    return (torch.where(norms > 0, 1.0 / norms, 0.0) @ x).double()
