"""digests.jsonl: what every parameter and gradient was, so that two runs can be compared tensor by tensor (``tools/compare_runs.py``)."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

import torch

from megatron_ext.checkpoint.attempts import do_on_main
from megatron_ext.config import RunConfig
from megatron_ext.data.corpus import Piece
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import parameter_shapes
from megatron_ext.optim.digests import Digest, part_digest, summed
from megatron_ext.optim.ownership import OwnedBox
from megatron_ext.optim.sharded import ShardedOptimizer
from megatron_ext.parallel.world import World
from megatron_ext.report.digests import DIGESTS_FILE
from megatron_ext.train.engine import StepOptimizer
from megatron_ext.train.metrics import MetricsWriter

Parts = Iterable[tuple[OwnedBox, torch.Tensor]]


class DigestWriter:
    """Writes the digests of every ``every`` steps, and of the parameters with which the run begins or goes on.

    Gradients are those of the whole step before clipping and before any method changes them, parameters the masters. All ranks call all
    methods.

    Args:
        run_dir: of the run.
        every: steps between digests.
        optimizer: of the run.
        config: of the model.
        world: all ranks.
        step: from which the run goes on; digests of later steps are dropped.
    """

    def __init__(self, run_dir: Path, every: int, optimizer: ShardedOptimizer, config: ModelConfig, world: World, step: int) -> None:
        self._every, self._optimizer, self._world = every, optimizer, world
        self._shapes = parameter_shapes(config)
        self._gradients: dict[str, Digest] = {}
        self._file = MetricsWriter(run_dir, step, world.is_main, DIGESTS_FILE)
        self._begin(step)

    def begin_step(self, step: int) -> None:
        """Before the gradients of ``step`` are reduced."""
        self._optimizer.observe = self._note if step % self._every == 0 else None

    def end_step(self, step: int, pieces: Sequence[Piece], loss: float, lr: float) -> None:
        """After the update. ``loss`` in nats per token, ``lr`` the learning rate of the step."""
        if self._optimizer.observe is None:
            return
        documents = hashlib.blake2b(json.dumps([astuple(piece) for piece in pieces]).encode(), digest_size=8).hexdigest()
        gradients, parameters = self._told(self._gradients), self._told(self._digests(self._masters()))
        self._file.write("digests", step=step, documents=documents, loss=loss, lr=lr, gradients=gradients, parameters=parameters)

    def flush(self) -> None:
        """Put on disk what was written. Raises StorageError if that cannot be."""
        self._file.flush()

    def go_back(self, step: int) -> None:
        """The run goes on after ``step`` with what it has now; digests of later steps are dropped, which it computes again."""
        do_on_main(self._world, lambda: self._file.go_back(step), "go back")
        self._begin(step)

    def _begin(self, step: int) -> None:
        self._file.write("begin", step=step, parameters=self._told(self._digests(self._masters())))

    def _note(self, gradients: Parts) -> None:
        self._gradients = self._digests(gradients)

    def _masters(self) -> Parts:
        return ((part, values["master"]) for part, values in self._optimizer.owned_state())

    def _digests(self, parts: Parts) -> dict[str, Digest]:
        """Of what this rank has of each parameter, by name."""
        found: dict[str, list[Digest]] = {}
        for part, values in parts:
            found.setdefault(part.name, []).append(part_digest(part, values, self._shapes[part.name]))
        return {name: summed(digests) for name, digests in found.items()}

    def _told(self, mine: Mapping[str, Digest]) -> dict[str, list[str | float]]:
        """Digest and norm of each whole parameter, in the order of the model, from the parts of all ranks."""
        ranks = self._world.gather(mine)
        wholes = {name: summed(rank[name] for rank in ranks if name in rank) for name in self._shapes}
        return {name: [f"{total:016x}", math.sqrt(squares)] for name, (total, squares) in wholes.items()}


def build_digests(config: RunConfig, optimizer: StepOptimizer, model: ModelConfig, world: World, step: int) -> DigestWriter | None:
    """What ``logging.digests_every`` asks for; the rules of the configuration say for which optimizers."""
    if config.logging.digests_every is None:
        return None
    assert isinstance(optimizer, ShardedOptimizer), "the configuration refuses ZeRO"
    return DigestWriter(Path(config.run_dir), config.logging.digests_every, optimizer, model, world, step)
