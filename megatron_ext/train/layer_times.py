"""How long the layers of a model take on this machine, to divide them evenly over pipeline stages."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch

from megatron_ext.kernels.varlen_attention import select_backend
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.parallel.device import choose_dtype, synchronize
from megatron_ext.parallel.world import World

ROUNDS = 3


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of forward and backward of a pack."""

    embedding: float
    block: float
    head: float

    def __str__(self) -> str:
        return f"embedding {self.embedding:.2g} s, block {self.block:.2g} s, head {self.head:.2g} s"


def measure_layers(config: ModelConfig, tokens: int, world: World) -> LayerTimes:
    """Time one pack of one document of ``tokens`` tokens on rank 0; every rank gets what rank 0 measured, so that all divide alike."""
    return LayerTimes(**world.on_main(asdict(_measure(config, tokens, world.device)) if world.is_main else None))


def _measure(config: ModelConfig, tokens: int, device: torch.device) -> LayerTimes:
    dtype, _ = choose_dtype("auto", device)
    attention, _ = select_backend("auto", device, dtype, config.head_dim)
    model = GPT(replace(config, num_layers=1), attention)
    model.reset_parameters(seed=0)
    model = model.to(device, dtype)
    ids = torch.zeros(tokens, dtype=torch.int64, device=device)
    weight = torch.ones(tokens, device=device)
    boundaries = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    pack = model.context(torch.arange(tokens, device=device), boundaries, tokens)
    x = torch.randn(tokens, config.hidden_size, device=device, dtype=dtype, requires_grad=True)
    return LayerTimes(
        embedding=_fastest(lambda: model.embed(ids).sum().backward(), device),
        block=_fastest(lambda: model.blocks(x, pack).sum().backward(), device),
        head=_fastest(lambda: model.loss(x, ids, weight)[0].backward(), device),
    )


def _fastest(work: Callable[[], None], device: torch.device) -> float:
    """Seconds of the fastest of some rounds, after one that warms up."""
    seconds = []
    for _ in range(ROUNDS + 1):
        synchronize(device)
        begin = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])
