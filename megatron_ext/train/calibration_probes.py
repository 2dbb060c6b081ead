"""What calibration times: packs, a step without any, attention by length of document, and exchanges by bytes."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from megatron_ext.data.batch import PackedBatch
from megatron_ext.kernels.varlen_attention import varlen_attention
from megatron_ext.model.gpt import GPT
from megatron_ext.parallel.device import synchronize
from megatron_ext.parallel.group import Group
from megatron_ext.parallel.world import World
from megatron_ext.planning.cost_model import Array, AttentionShape
from megatron_ext.train.engine import Engine
from megatron_ext.train.packs import sharing_of

ATTENTION_REPEATS = 4
"""So that a device that is given work ahead of time, as in a model, need not wait for it."""
REPEATED_BYTES = 2**24
MOST_REPEATS = 16
"""Exchanges of few bytes are repeated, so that the clock's own time does not count: as often as makes so many bytes, and no more."""


class Clock:
    """Times what all ranks begin at once.

    Args:
        world: all ranks.
        tick: called after each reading.
    """

    def __init__(self, world: World, tick: Callable[[], None]) -> None:
        self._world, self._tick = world, tick
        self._begin = 0.0

    def start(self) -> None:
        """Wait for all ranks and begin."""
        synchronize(self._world.device)
        self._world.barrier()
        self._begin = time.perf_counter()

    def stop(self) -> float:
        """Seconds since ``start``, the work of the device included."""
        synchronize(self._world.device)
        seconds = time.perf_counter() - self._begin
        self._tick()
        return seconds

    def time(self, work: Callable[[], object]) -> float:
        """Seconds that ``work`` takes on this rank."""
        self.start()
        work()
        return self.stop()


@dataclass(frozen=True)
class Probe:
    """Something that all ranks do at once."""

    count: int
    """Readings of the clock in one run."""
    run: Callable[[Clock], list[float]]
    """Returns ``count`` seconds of this rank."""


def measure(probes: Sequence[Probe], rounds: int, world: World, progress: Callable[[int, int], None]) -> list[Array]:
    """Seconds of each probe: of each reading the median of some rounds, in which probes take turns, on the slowest rank.

    Args:
        probes: the same on all ranks.
        rounds: that count; one more comes before, to warm up.
        world: all ranks.
        progress: called with the readings done and their number in all.
    """
    size = sum(probe.count for probe in probes)
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(done, size * (rounds + 1))

    clock = Clock(world, tick)
    seen = np.array([[seconds for probe in probes for seconds in probe.run(clock)] for _ in range(rounds + 1)])
    slowest = np.max(world.gather(np.median(seen[1:], axis=0).tolist()), axis=0)
    return np.split(slowest, np.cumsum([probe.count for probe in probes])[:-1])


class TimedPacks:
    """Packs that read the clock while an engine goes through them. The last one is not timed: gradients leave during its backward."""

    def __init__(self, batches: Sequence[PackedBatch], clock: Clock) -> None:
        self._batches, self._clock = batches, clock
        self.seconds: list[float] = []

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[PackedBatch]:
        for batch in self._batches[:-1]:
            self._clock.start()
            yield batch
            self.seconds.append(self._clock.stop())
        yield self._batches[-1]


def probe_packs(engine: Engine, model: GPT, batches: Sequence[PackedBatch]) -> Probe:
    """Forward and backward of all packs but the last, in a step of the engine. On all ranks as many.

    In a pipeline each stage is timed for itself, outside the engine, whose stages wait for each other: the slowest one paces them all.
    """
    pipeline = engine.grid.shape.pp > 1

    def run(clock: Clock) -> list[float]:
        if pipeline:
            engine.optimizer.expect_backwards(len(batches))
            seconds = [clock.time(partial(_through_stage, model, engine, batch.to(engine.grid.world.device))) for batch in batches[:-1]]
            engine.optimizer.zero_grad()
            return seconds
        packs = TimedPacks(batches, clock)
        _step(engine, packs)
        return packs.seconds

    return Probe(len(batches) - 1, run)


def _through_stage(model: GPT, engine: Engine, batch: PackedBatch) -> None:
    """Forward and backward of a pack through the layers of this rank, from any hidden state and gradient where others have the rest."""
    pack = model.context(batch.positions, batch.cu_seqlens, batch.max_seqlen, sharing_of(batch, engine.grid))
    if model.stage.is_first:
        x = model.embed(batch.tokens)
    else:
        entered = torch.randn(len(batch.tokens), model.config.hidden_size, device=batch.tokens.device, dtype=pack.cos.dtype)
        x = model.tp.leave(entered).requires_grad_()
    x = model.blocks(x, pack)
    out = model.loss(x, batch.labels, batch.loss_weight)[0] if model.stage.is_last else x
    out.backward(torch.ones_like(out))


def _step(engine: Engine, packs: TimedPacks | Sequence[PackedBatch]) -> None:
    engine.step(packs, 1, torch.zeros(0, dtype=torch.float64))


def probe_step(engine: Engine, empty: PackedBatch) -> Probe:
    """A step without packs: gradients, of zeros, to their owners, the update, new values to all ranks; nothing overlaps it.

    ``empty``, a pack of no tokens, is for engines that take no step without one.
    """
    return Probe(1, lambda clock: [clock.time(lambda: _step(engine, [empty] if engine.in_rounds else []))])


def probe_attention(shape: AttentionShape, lengths: Sequence[int], tokens: int, backend: str, like: torch.Tensor) -> Probe:
    """Forward and backward of attention in one layer: seconds of one document of each length, in packs of about ``tokens`` tokens.

    Args:
        shape: heads of this rank.
        lengths: of documents, in tokens.
        tokens: of a pack.
        backend: of ``varlen_attention``.
        like: has the dtype and device of activations.
    """

    def run(clock: Clock) -> list[float]:
        heads = (shape.query_heads, shape.kv_heads, shape.kv_heads)
        qkv = [torch.randn(tokens, each, shape.head_dim, dtype=like.dtype, device=like.device) for each in heads]
        documents = [tokens // length for length in lengths]
        seconds = [clock.time(partial(_attend, qkv, length, count, backend)) for length, count in zip(lengths, documents, strict=True)]
        return [each / ATTENTION_REPEATS / count for each, count in zip(seconds, documents, strict=True)]

    return Probe(len(lengths), run)


def _attend(qkv: Sequence[torch.Tensor], length: int, documents: int, backend: str) -> None:
    q, k, v = (x[: length * documents].detach().requires_grad_() for x in qkv)
    boundaries = torch.arange(documents + 1, device=q.device, dtype=torch.int32) * length
    for _ in range(ATTENTION_REPEATS):
        out = varlen_attention(q, k, v, boundaries, length, backend=backend)
        torch.autograd.grad(out, (q, k, v), q)


def probe_all_to_all(block: Group | None, sizes: Sequence[int], like: torch.Tensor) -> Probe:
    """All-to-alls in which each rank of a block sends so many bytes to others, all blocks at once.

    Args:
        block: that this rank is in; None: none.
        sizes: bytes, whole elements for each of the others.
        like: has the dtype and device of what is sent.
    """
    size = block.size if block is not None else 2

    def exchange(buffer: torch.Tensor, repeats: int) -> None:
        parts = [len(buffer) // size] * size
        for _ in range(repeats if block is not None else 0):
            block.all_to_all(buffer, parts, parts)

    return _probe_exchange(exchange, [sent // ((size - 1) * like.element_size()) * size for sent in sizes], sizes, like)


def probe_ring_step(ring: Group | None, sizes: Sequence[int], like: torch.Tensor) -> Probe:
    """Steps of a ring in which each rank sends so many bytes to the next; as ``probe_all_to_all``."""

    def exchange(buffer: torch.Tensor, repeats: int) -> None:
        for _ in range(repeats if ring is not None else 0):
            for work in ring.start_rotate(buffer, buffer.shape)[1]:
                work.wait()

    return _probe_exchange(exchange, [sent // like.element_size() for sent in sizes], sizes, like)


def _probe_exchange(
    exchange: Callable[[torch.Tensor, int], None], elements: Sequence[int], sizes: Sequence[int], like: torch.Tensor
) -> Probe:
    """Seconds of one exchange of each size in bytes, the buffers being of so many elements."""

    def run(clock: Clock) -> list[float]:
        seconds = []
        for sent, count in zip(sizes, elements, strict=True):
            repeats = max(1, min(MOST_REPEATS, REPEATED_BYTES // sent))
            buffer = torch.zeros(count, dtype=like.dtype, device=like.device)
            seconds.append(clock.time(partial(exchange, buffer, repeats)) / repeats)
        return seconds

    return Probe(len(sizes), run)
