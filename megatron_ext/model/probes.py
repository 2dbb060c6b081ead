"""What happens inside a model while it trains, seen by hooks that are there for one step only.

Modules only hand over what they compute; all arithmetic waits until the block has returned, outside of activation checkpointing. What a
block computes again for backward is not seen: only a whole block, called by the model, opens the eyes of the hooks inside it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_ext.kernels.sink_mass import sink_mass
from megatron_ext.kernels.varlen_attention import varlen_attention
from megatron_ext.model.block import Block
from megatron_ext.model.channel_statistics import TokenSums, kurtosis_centred, kurtosis_released, max_to_mean, token_sums, variance
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.context import PackContext
from megatron_ext.model.gpt import GPT
from megatron_ext.model.max_logits import MaxLogits
from megatron_ext.model.rope import apply_rope
from megatron_ext.parallel.ring import ring_attention
from megatron_ext.parallel.sequence import shared_attention
from megatron_ext.parallel.split import Split

RESIDUAL = "residual"
READ = {"o_proj": "attention_output", "down_proj": "down_proj_input"}
"""Linears whose input is looked at, and what it is called."""
MADE = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}
"""Linears whose output is looked at, before norms of heads and rotation, and what it is called."""
MEASURES: Mapping[str, Callable[[TokenSums, int], Tensor]] = {
    "kurtosis_released": kurtosis_released,
    "kurtosis_centred": kurtosis_centred,
    "max_to_mean": max_to_mean,
    "variance": variance,
}
"""Of each token; ``ProbeTables`` has their sums."""


class ProbeTables:
    """Sums over the tokens of a step, with a place for every layer, channel and head of the whole model.

    What several ranks hold alike only one of them counts, so that the sum of all ranks' ``flat`` is that of the step. By name:

    - ``<site>.tokens`` [depths, measures + 1]: sums of ``MEASURES`` over tokens, and the number of tokens.
    - ``<site>.energy`` [depths, width]: squares of each channel, summed over tokens.
    - ``gradient`` [layers + 1]: squares of the loss's gradient at the residual stream.
    - ``parameter_gradient`` [layers]: squares of the gradients of the block's parameters; left to who knows them.
    - ``sink`` [layers, query heads]: probabilities that queries give to the first token of their document, which is none of them.
    - ``queries`` [2]: number of such queries, and what uniform attention would give.

    Depth is the number of the block from 0; for the residual stream, the number of blocks behind it.

    Args:
        config: shape of the whole model.
        norms: names of the norms that any block has.
        device: of the model.
    """

    def __init__(self, config: ModelConfig, norms: Sequence[str], device: torch.device | str = "cpu") -> None:
        layers, queries, keys = config.num_layers, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.widths = {
            RESIDUAL: config.hidden_size,
            **dict.fromkeys(norms, config.hidden_size),
            **{"q": queries, "k": keys, "v": keys, "attention_output": queries, "down_proj_input": config.intermediate_size},
        }
        """Channels of every site."""
        shapes: dict[str, tuple[int, ...]] = {"gradient": (layers + 1,), "parameter_gradient": (layers,)}
        shapes |= {"sink": (layers, config.num_heads), "queries": (2,)}
        for site, width in self.widths.items():
            depths = layers + (site == RESIDUAL)
            shapes |= {f"{site}.tokens": (depths, len(MEASURES) + 1), f"{site}.energy": (depths, width)}
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        self.flat = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        parts = zip(shapes.items(), self.flat.split(sizes), strict=True)
        self._tables = {name: part.view(shape) for (name, shape), part in parts}

    def __getitem__(self, name: str) -> Tensor:
        return self._tables[name]


class WatchedLogits(MaxLogits):
    """Takes maxima in float64, and hands them on to who takes them anyway."""

    def __init__(self, config: ModelConfig, device: torch.device | str, beside: MaxLogits | None) -> None:
        super().__init__(config, device)
        self.values = self.values.double()
        self._beside = beside

    def add(self, layer: int, heads: range, values: Tensor) -> None:
        """See ``MaxLogits``."""
        super().add(layer, heads, values)
        if self._beside is not None and self._beside.enabled:
            self._beside.add(layer, heads, values)


@contextmanager
def watched(model: GPT, norms: Sequence[str]) -> Iterator[tuple[ProbeTables, WatchedLogits]]:
    """Look at every block of this rank's ``model`` in training, from here to the end of the context, whatever packs come.

    With tensor-parallel ranks, sends 48 bytes of each token for every site whose channels are divided; where packs are shared, what
    attention sends forward once more. Changes no bit of what the model computes.

    Args:
        model: all ranks watch theirs at the same time.
        norms: names of the norms that any block of any rank has.

    Yields:
        What the ranks will add up, and of which they will take the largest.
    """
    device = next(model.parameters()).device
    tables, logits = ProbeTables(model.config, norms, device), WatchedLogits(model.config, device, model.max_logits)
    probes = [BlockProbe(block, int(number), tables) for number, block in model.model.layers.items()]
    handles = [handle for probe in probes for handle in probe.attach()]
    try:
        for probe in probes:
            probe.block.self_attn.max_logits = logits
        yield tables, logits
    finally:
        for probe in probes:
            probe.block.self_attn.max_logits = model.max_logits
        for handle in handles:
            handle.remove()


def norm_names(block: nn.Module) -> list[str]:
    """Names of the norms of the residual stream in a block, wherever they are placed."""
    return [name for name, _ in block.named_children() if name.endswith("norm")]


class BlockProbe:
    """Adds to ``tables`` what block number ``layer`` of the whole model does."""

    def __init__(self, block: Block, layer: int, tables: ProbeTables) -> None:
        self.block, self.tp, self.layer, self.tables = block, block.tp, layer, tables
        self._seen: dict[str, list[Tensor]] | None = None
        """What modules handed over since the block was called, by tiles of tokens; None: nobody called it."""

    def attach(self) -> list[RemovableHandle]:
        """Hooks on the block and on what is inside."""
        attention, mlp = self.block.self_attn, self.block.mlp
        handles = [self.block.register_forward_pre_hook(self._begin), self.block.register_forward_hook(self._end)]
        made = {name: self.block.get_submodule(name) for name in norm_names(self.block)}
        made |= {site: attention.get_submodule(name) for name, site in MADE.items()}
        made |= {name: norm for name in ("q_norm", "k_norm") if (norm := getattr(attention, name)) is not None}
        handles += [module.register_forward_hook(partial(self._made, site)) for site, module in made.items()]
        read = {READ["o_proj"]: attention.o_proj, READ["down_proj"]: mlp.down_proj}
        return handles + [module.register_forward_pre_hook(partial(self._read, site)) for site, module in read.items()]

    def _made(self, site: str, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if self._seen is not None:
            self._seen.setdefault(site, []).append(output)

    def _read(self, site: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if self._seen is not None:
            self._seen.setdefault(site, []).append(arguments[0])

    def _begin(self, block: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._seen = {}
        if self.layer == 0:
            x, pack = arguments
            self._add_stream(0, x, pack.tokens)

    def _end(self, block: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        assert self._seen is not None, "the block was called"
        pack, seen = arguments[1], {site: tiles[0] if len(tiles) == 1 else torch.cat(tiles) for site, tiles in self._seen.items()}
        self._seen = None
        self._add_stream(self.layer + 1, output, pack.tokens)
        with torch.no_grad():
            for name in norm_names(self.block):
                self._add(name, self.layer, self._counted(seen[name], pack.tokens))
            self._add_divided({site: seen[site] for site in (*MADE.values(), *READ.values())})
            self._add_sink(seen, pack)

    def _counted(self, x: Tensor, tokens: int) -> Tensor:
        """The rows of ``x``, as it is outside a tensor-parallel region, that this rank counts: each token once, no padding."""
        if self.tp.shard_tokens:
            return x[: max(0, tokens - self.tp.group.rank * len(x))]
        return x if self.tp.group.rank == 0 else x[:0]

    def _add_stream(self, depth: int, x: Tensor, tokens: int) -> None:
        """The residual stream behind ``depth`` blocks, and later its gradient."""
        with torch.no_grad():
            self._add(RESIDUAL, depth, self._counted(x, tokens))
        if x.requires_grad:
            x.register_hook(lambda gradient: self._add_gradient(depth, self._counted(gradient, tokens)))

    def _add_gradient(self, depth: int, gradient: Tensor) -> None:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        self.tables["gradient"][depth] += torch.linalg.vector_norm(gradient, dtype=wide).double().square()

    def _add(self, site: str, depth: int, x: Tensor) -> None:
        """All channels of some tokens."""
        self._add_tokens(site, depth, token_sums(x))
        self.tables[f"{site}.energy"][depth] += _energy(x)

    def _add_tokens(self, site: str, depth: int, sums: TokenSums) -> None:
        width = self.tables.widths[site]
        values = [measure(sums, width).sum() for measure in MEASURES.values()]
        table = self.tables[f"{site}.tokens"]
        table[depth] += torch.stack([*values, values[0].new_tensor(float(sums.largest.shape[-1]))])

    def _add_divided(self, seen: Mapping[str, Tensor]) -> None:
        """What the tensor-parallel ranks hold other channels of; of neighbours that hold the same ones, the first counts."""
        attention, group = self.block.self_attn, self.tp.group
        splits = {site: getattr(attention, name).split for name, site in MADE.items()}
        splits |= {READ["o_proj"]: attention.o_proj.split, READ["down_proj"]: self.block.mlp.down_proj.split}
        sums = [token_sums(x) for x in seen.values()]
        counts = [self._is_first(splits[site]) for site in seen]
        powers = torch.stack([each.powers if first else torch.zeros_like(each.powers) for each, first in zip(sums, counts, strict=True)])
        powers = group.all_reduce(powers)
        largest = group.all_reduce(torch.stack([each.largest for each in sums]), torch.distributed.ReduceOp.MAX)
        for number, (site, x) in enumerate(seen.items()):
            if group.rank == 0:
                self._add_tokens(site, self.layer, TokenSums(powers[number], largest[number]))
            if counts[number]:
                self.tables[f"{site}.energy"][self.layer, splits[site].start : splits[site].stop] += _energy(x)

    def _is_first(self, split: Split) -> bool:
        return self.tp.group.rank % split.copies == 0

    def _add_sink(self, seen: Mapping[str, Tensor], pack: PackContext) -> None:
        """What queries give to first tokens, by query head."""
        attention = self.block.self_attn
        q, k = (
            apply_rope(seen[norm] if norm in seen else seen[site].unflatten(-1, (-1, attention.head_dim)), pack.cos, pack.sin)
            for site, norm in (("q", "q_norm"), ("k", "k_norm"))
        )
        # Positions begin anew in each document, and only position 0 turns by no angle: no other whole number is a multiple of pi.
        first = ~pack.sin.any(-1)
        mass = sink_mass(q, k, first, partial(shared_attention, sharing=pack.sharing, attend=_attend(pack, attention.backend)))
        split = attention.q_proj.split
        if self._is_first(split):
            heads = slice(split.start // attention.head_dim, split.stop // attention.head_dim)
            self.tables["sink"][self.layer, heads] += mass.double().masked_fill_(first[:, None], 0.0).sum(0)
        if self.layer == 0 and self.tp.group.rank == 0:
            self.tables["queries"][0] += (~first).sum()
            self.tables["queries"][1] += _uniform_mass(pack)


def _energy(x: Tensor) -> Tensor:
    """Squares of each channel of ``x`` [T, channels], summed over tokens: float64 [channels]."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(0, dtype=torch.float64)


def _attend(pack: PackContext, backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention of all tokens of the ranks that divide the heads, as the model computes it."""
    if pack.sharing is not None and pack.sharing.ring is not None:
        return partial(ring_attention, chunks=pack.sharing.chunks, ring=pack.sharing.ring)
    return partial(varlen_attention, cu_seqlens=pack.cu_seqlens, max_seqlen=pack.max_seqlen, backend=backend)


def _uniform_mass(pack: PackContext) -> Tensor:
    """Sum of 1 / (position + 1) over all tokens of the pack that are not first, divided by the ranks that share it: float64 []."""
    lengths = pack.cu_seqlens.diff().double()
    total = (torch.special.digamma(lengths[lengths > 0] + 1) - torch.special.digamma(lengths.new_tensor(2.0))).sum()
    ranks = 1
    if pack.sharing is not None:
        ranks = pack.sharing.heads.size * (pack.sharing.ring.size if pack.sharing.ring is not None else 1)
    return total / ranks
