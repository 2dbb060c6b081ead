"""What a user can say about the run itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from megatron_ext.config.skip_options import SkipOptions
from megatron_ext.option_rules import require

MOST_HANG_SECONDS = 1200.0
"""Below the 30 minutes after which a collective gives up."""


@dataclass
class TrainOptions:
    """Length and numbers of a run."""

    steps: int | None = None
    """Optimizer steps of the run. Give either this or ``tokens``."""
    tokens: int | None = None
    """Token budget of the run, turned into steps by ``data.tokens_per_step``."""
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"
    """Of parameters and activations: ``bfloat16``, ``float32``, ``float64``; ``auto``: bfloat16 where the device is fast at it."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What backward computes again instead of keeping it: nothing, all but matrix products and attention, or each whole block."""
    offload_activations: bool = False
    """Keep the inputs of recomputed blocks in the host's memory until backward needs them; with activation_checkpointing on."""
    mlp_tile_tokens: int | None = None
    """Compute MLPs over so many tokens at a time and again in backward, so that their intermediate channels never exist for a whole pack;
    null: at once."""
    loss_tile_tokens: int | None = None
    """Most tokens whose logits exist at once; null: what suits the device."""
    check_replicas_every: int | None = 100
    """Compare the parameters of ranks that must hold the same every this many steps, and stop if they differ; null: never."""
    skip: SkipOptions = field(default_factory=SkipOptions)
    """Which updates are left out."""
    heartbeat_timeout: float = 60.0
    """Seconds without a sign of life from a rank after which all others end and name it."""
    hang_timeout: float | None = 300.0
    """Seconds in which no rank gets on while ranks wait for others, after which all end and name those that are waited for, with their
    stacks; at least ten median steps, and four times as long until the first step has ended, in loading a checkpoint and at the end.
    null: never."""
    threads_per_rank: int | None = None
    """CPU threads of a rank; null: the cores of the machine divided by its ranks."""

    def __post_init__(self) -> None:
        given = [length for length in (self.steps, self.tokens) if length is not None]
        require(
            (len(given) > 0, "steps", self.steps, "a number of steps, or null with tokens set"),
            (len(given) < 2, "tokens", self.tokens, f"null, because steps is set ({self.steps}); exactly one of the two"),
            (self.steps is None or self.steps >= 1, "steps", self.steps, "at least 1"),
            (self.tokens is None or self.tokens >= 1, "tokens", self.tokens, "at least 1"),
            (
                self.activation_checkpointing != "none" or not self.offload_activations,
                "offload_activations",
                self.offload_activations,
                "false with activation_checkpointing none: only inputs of recomputed blocks are offloaded",
            ),
            (self.mlp_tile_tokens is None or self.mlp_tile_tokens >= 1, "mlp_tile_tokens", self.mlp_tile_tokens, "at least 1, or null"),
            (self.loss_tile_tokens is None or self.loss_tile_tokens >= 1, "loss_tile_tokens", self.loss_tile_tokens, "at least 1, or null"),
            (
                self.hang_timeout is None or 1 <= self.hang_timeout <= MOST_HANG_SECONDS,
                "hang_timeout",
                self.hang_timeout,
                f"seconds, from 1 to {MOST_HANG_SECONDS:.0f}, or null",
            ),
            (self.heartbeat_timeout >= 1, "heartbeat_timeout", self.heartbeat_timeout, "seconds, at least 1"),
            (
                self.check_replicas_every is None or self.check_replicas_every >= 1,
                "check_replicas_every",
                self.check_replicas_every,
                "a number of steps, at least 1, or null",
            ),
            (self.threads_per_rank is None or self.threads_per_rank >= 1, "threads_per_rank", self.threads_per_rank, "at least 1, or null"),
        )


@dataclass
class NeedleOptions:
    """Documents that hide a key with its value in validation text and end with the key: the value is due."""

    lengths: list[int]
    """Tokens of whole documents."""
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    """Shares of the text that stand before the needle, from 0 to 1."""
    samples: int = 4
    """Documents of each length and depth."""
    every: int | None = None
    """Steps between; before the first step and after the last in any case. null: whenever losses are evaluated."""
    key_tokens: int = 4
    """Tokens of a key."""
    value_tokens: int = 4
    """Tokens of a value."""
    seed: int = 0
    """Decides keys, values and where the text begins."""

    def __post_init__(self) -> None:
        words = 2 * (self.key_tokens + self.value_tokens)
        require(
            (bool(self.lengths) and _ascends(self.lengths), "lengths", self.lengths, "numbers of tokens, ascending"),
            (bool(self.depths) and _ascends(self.depths), "depths", self.depths, "numbers from 0 to 1, ascending"),
            (all(0 <= depth <= 1 for depth in self.depths), "depths", self.depths, "numbers from 0 to 1, ascending"),
            (self.samples >= 1, "samples", self.samples, "at least 1"),
            (self.every is None or self.every >= 1, "every", self.every, "a number of steps, at least 1, or null"),
            (self.key_tokens >= 1, "key_tokens", self.key_tokens, "at least 1"),
            (self.value_tokens >= 1, "value_tokens", self.value_tokens, "at least 1"),
            (min(self.lengths, default=words) >= words, "lengths", self.lengths, f"at least {words}: twice a key and its value"),
            (0 <= self.seed < 2**63, "seed", self.seed, "at least 0 and less than 2**63"),
        )


@dataclass
class EvaluationOptions:
    """Loss on the validation corpora, and retrieval of needles from their text."""

    every: int | None = None
    """Evaluate every this many steps; null: only before the first and after the last step."""
    tokens: int = 65536
    """Most tokens of each validation corpus."""
    position_buckets: list[int] = field(default_factory=lambda: [1024, 4096, 16384, 65536])
    """Positions in a document at which the next bucket begins: losses are also told apart by bucket. Empty: they are not."""
    needle: NeedleOptions | None = None
    """Ask for hidden keys; null: not."""

    def __post_init__(self) -> None:
        buckets = self.position_buckets
        require(
            (self.every is None or self.every >= 1, "every", self.every, "a number of steps, at least 1, or null"),
            (self.tokens >= 1, "tokens", self.tokens, "at least 1"),
            (_ascends([0, *buckets]), "position_buckets", buckets, "positions from 1 up, ascending, or an empty list"),
        )


def _ascends(numbers: Sequence[float]) -> bool:
    return all(first < second for first, second in pairwise(numbers))


@dataclass
class ProfileOptions:
    """Which steps of which ranks torch.profiler traces."""

    steps: list[int]
    """First and last step."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that write a trace."""

    def __post_init__(self) -> None:
        ordered = len(self.steps) == 2 and 1 <= self.steps[0] <= self.steps[1]
        require(
            (ordered, "steps", self.steps, "a list of the first and the last step, from 1 up"),
            (bool(self.ranks) and _ascends([-1, *self.ranks]), "ranks", self.ranks, "numbers of ranks, from 0 up, ascending"),
        )


@dataclass
class LoggingOptions:
    """What a run prints and writes."""

    every: int = 10
    """Steps between console lines. metrics.jsonl has a line for every step."""
    probes_every: int | None = None
    """Look inside the model in the first step and every this many: outliers of activations, attention sinks and logits, the residual
    stream and its gradient by depth. Such a step takes up to half as long again. null: never."""
    ledger: bool = False
    """Write the documents of every step into ``ledger/`` in the run directory. Those of skipped steps are written there in any case."""
    digests_every: int | None = None
    """Write digests of all gradients and parameters to digests.jsonl every this many steps, for ``tools/compare_runs.py``. null: never."""
    tensorboard: bool = True
    """Write TensorBoard events through DeepSpeed's monitor."""
    straggler_ratio: float = 1.5
    """Seconds of own work over the median of the ranks of a stage from which on a rank is slow."""
    straggler_steps: int = 20
    """After so many slow steps in a row a rank is told about, by a `straggler` event."""
    profile: ProfileOptions | None = None
    """Steps to write traces of; null: none."""

    def __post_init__(self) -> None:
        require(
            (self.every >= 1, "every", self.every, "a number of steps, at least 1"),
            (self.straggler_ratio > 1, "straggler_ratio", self.straggler_ratio, "more than 1"),
            (self.straggler_steps >= 1, "straggler_steps", self.straggler_steps, "a number of steps, at least 1"),
            *(
                (every is None or every >= 1, key, every, "a number of steps, at least 1, or null")
                for key, every in (("probes_every", self.probes_every), ("digests_every", self.digests_every))
            ),
        )
