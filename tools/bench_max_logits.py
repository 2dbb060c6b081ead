"""The largest attention logits: several documents at a time, and what taking them adds to attention and to a whole block, forward.

Results of the ways of a table are equal: where attention or a block is timed, they are its outputs.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from bench_kernels import Case, Options
from torch import Tensor

from megatron_ext.kernels.max_logits import max_attention_logits, max_chunk_logits
from megatron_ext.kernels.varlen_attention import varlen_attention
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.model.max_logits import MaxLogits

WIDTH, HIDDEN, HEAD_DIM, GROUP = 4096, 11008, 64, 4
PACKS = {"1 document": [4096], "256 documents": [16] * 256, "uneven documents": [2000, 900, 450, 250, *[62] * 8]}
"""Lengths of the documents of packs of 4096 tokens."""


def cases(options: Options) -> Iterator[Case]:
    """For every pack: the kernel, attention, a block."""
    heads = max(GROUP, WIDTH // options.scale // HEAD_DIM // GROUP * GROUP)
    dtype = str(options.dtype).removeprefix("torch.")
    for name, lengths in PACKS.items():
        title = f"{name}, {heads} heads over {heads // GROUP}, {dtype}"
        boundaries = torch.tensor([0, *lengths], device=options.device).cumsum(0).to(torch.int32)
        q, k, v = (torch.randn(4096, n, HEAD_DIM, device=options.device).to(options.dtype) for n in (heads, heads // GROUP, heads // GROUP))
        yield Case(f"max_logits, {title}", kernels(q, k, boundaries))
        yield Case(f"attention, {title}", attention(q, k, v, boundaries, max(lengths)))
        yield Case(f"block, {title}", block(heads, options, boundaries, max(lengths)))


def kernels(q: Tensor, k: Tensor, boundaries: Tensor) -> dict[str, Callable[[], Sequence[Tensor]]]:
    """The kernel on the pack, and on a document at a time."""
    documents = [slice(*borders) for borders in pairwise(boundaries.tolist())]
    return {
        "tiles": lambda: [max_attention_logits(q, k, boundaries)],
        "document by document": lambda: [torch.stack([max_chunk_logits(q[each], k[each], True) for each in documents]).amax(0)],
    }


def attention(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, longest: int) -> dict[str, Callable[[], Sequence[Tensor]]]:
    """Attention forward without and with the pass."""

    def attend() -> Sequence[Tensor]:
        return [varlen_attention(q, k, v, boundaries, longest)]

    def observed() -> Sequence[Tensor]:
        max_attention_logits(q, k, boundaries)
        return attend()

    return {"attention": attend, "with largest logits": observed}


def block(heads: int, options: Options, boundaries: Tensor, longest: int) -> dict[str, Callable[[], Sequence[Tensor]]]:
    """A block forward without and with the pass."""
    width = heads * HEAD_DIM
    config = ModelConfig(64, width, HIDDEN * width // WIDTH, 1, heads, heads // GROUP, HEAD_DIM, 4096)
    collector = MaxLogits(config, options.device)
    model = GPT(config, max_logits=collector)
    model.reset_parameters(0)
    model.to(options.device, options.dtype)
    tokens = torch.arange(4096, device=options.device)
    starts = boundaries.to(torch.int64)[torch.bucketize(tokens, boundaries, right=True) - 1]
    pack = model.context((tokens - starts).to(torch.int32), boundaries, longest)
    x = torch.randn(4096, width, device=options.device).to(options.dtype)

    def forward(enabled: bool) -> Sequence[Tensor]:
        collector.enabled = enabled
        with torch.no_grad():
            return [model.blocks(x, pack)]

    return {"block": lambda: forward(False), "with largest logits": lambda: forward(True)}
