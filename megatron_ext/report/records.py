"""The records of ``metrics.jsonl`` and ``events.jsonl``: what a line may say, and how a line that says something else is refused."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from types import MappingProxyType
from typing import Any, get_type_hints

import numpy as np

PACK = np.dtype(
    [(name, np.int64) for name in ("first_rank", "degree", "ring", "tokens", "documents")] + [("begin", np.float64), ("end", np.float64)]
)
"""A pack of a plan, computed by the ``degree`` ranks from ``first_rank`` on. Begin and end in predicted seconds since the step began."""


@dataclass(frozen=True, kw_only=True)
class StartRecord:
    """A process group began to train: from nothing (step 0) or from a checkpoint (step > 0). Entropies in nats per token."""

    time: float
    step: int
    run: str
    ranks: int = 1
    parameters: int = 0
    total_steps: int = 0
    tokens_per_step: int = 0
    device: str = ""
    dtype: str = ""
    attention: str = ""
    unigram_entropy: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainRecord:
    """One optimizer step. Losses in nats per token; tokens, skipped steps and epochs count from the start of the run."""

    time: float
    step: int
    tokens: int
    loss: float
    loss_by_source: dict[str, float] = field(default_factory=dict)
    tokens_by_source: dict[str, int] = field(default_factory=dict)
    lr: float = math.nan
    grad_norm: float = math.nan
    tokens_per_second: float = math.nan
    tflops: float = math.nan
    memory_gib: float = math.nan
    step_seconds: float = math.nan
    pack_fill: float = math.nan
    length_histogram: dict[str, int] = field(default_factory=dict)
    skipped_steps: int = 0
    epochs: dict[str, float] = field(default_factory=dict)
    plan_policy: str = ""
    """That made the plan of the step, which need not be the policy of the run; empty in runs of old versions."""
    plan_seconds: float = math.nan
    """Predicted, of the step."""
    plan_gap: float = math.nan
    """Predicted seconds over their lower bound, less 1."""
    planning_seconds: float = math.nan
    plan_stall_seconds: float = math.nan
    """How long training waited for the plan."""
    exchange_seconds: float = math.nan
    """Mean over ranks of the seconds in all-to-alls; 0 where they are not measured."""
    tokens_by_degree: dict[str, int] = field(default_factory=dict)
    """Tokens by the number of ranks that share their pack."""
    slowest_rank: int = 0
    slowest_ratio: float = math.nan
    """Seconds of own work of the slowest rank over the median of its stage."""
    slow_steps: dict[str, int] = field(default_factory=dict)
    """By rank, since the last start."""

    def __post_init__(self) -> None:
        for name in ("length_histogram", "tokens_by_degree"):
            if not all(key.isascii() and key.isdigit() and _is_power_of_two(int(key)) for key in getattr(self, name)):
                raise ValueError(f"{name} has a key that is not a power of two")
        if min(self.tokens_by_degree.values(), default=0) < 0:
            raise ValueError(f"tokens_by_degree is {self.tokens_by_degree}, expected no negative number")

    @property
    def exchange_share(self) -> float:
        """Of the step's seconds, those in all-to-alls."""
        return self.exchange_seconds / self.step_seconds if self.step_seconds > 0 else math.nan

    @property
    def stall_share(self) -> float:
        """Of the step's seconds, those that training waited for the plan."""
        return self.plan_stall_seconds / self.step_seconds if self.step_seconds > 0 else math.nan


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """Loss (nats per token) on one source after ``step`` optimizer steps and ``tokens`` training tokens of the run."""

    time: float
    step: int
    tokens: int
    source: str
    loss: float
    split: str = "validation"
    eval_tokens: int = 0
    by_position: list[dict[str, float]] = field(default_factory=list)
    """Of buckets of positions in documents: ``start``, ``stop`` (NaN: no limit), ``loss`` and ``tokens``."""

    def __post_init__(self) -> None:
        if not all({"start", "stop", "loss", "tokens"} <= bucket.keys() for bucket in self.by_position):
            raise ValueError(f"by_position is {self.by_position!r:.80}, expected start, stop, loss and tokens of each bucket")


@dataclass(frozen=True, kw_only=True)
class NeedleRecord:
    """Retrieval of needles after ``step`` steps, by length (rows) and depth (columns)."""

    time: float
    step: int
    tokens: int
    lengths: list[int]
    """Tokens of a document."""
    depths: list[float]
    """Share of the text before the needle."""
    samples: int
    """Documents of each length and depth."""
    exact: list[list[float]]
    """Share of samples whose whole value is what the model holds likeliest."""
    log_probability: list[list[float]]
    """Mean over the tokens of values, in nats."""

    def __post_init__(self) -> None:
        for name in ("exact", "log_probability"):
            rows = getattr(self, name)
            if len(rows) != len(self.lengths) or any(len(row) != len(self.depths) for row in rows) or not (self.lengths and self.depths):
                raise ValueError(f"{name} has not a row for each of {len(self.lengths)} lengths with {len(self.depths)} depths")


@dataclass(frozen=True, kw_only=True)
class EventRecord:
    """Something that happened: ``start``, ``resume``, ``save``, ``skip``, ``stop`` and others."""

    step: int
    event: str
    time: float = math.nan
    details: dict[str, Any] = field(default_factory=dict)
    """What else the line says."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanRecord:
    """The plan of a step: what each rank was predicted to do when."""

    time: float
    step: int
    devices: int
    """Ranks that the packs are spread over."""
    in_rounds: bool
    """Ranks wait for each other between packs."""
    seconds: float
    """Predicted, of the step."""
    bound: float
    """No plan takes less; 0 or NaN where no bound is known."""
    packs: np.ndarray
    """Of type ``PACK``, [packs]. Those of no tokens only keep ranks in step."""

    def __post_init__(self) -> None:
        known = 0 <= self.seconds < math.inf and (0 <= self.bound < math.inf or math.isnan(self.bound))
        if not (known and 1 <= self.devices < 2**31):
            values = f"devices {self.devices}, seconds {self.seconds}, bound {self.bound}"
            raise ValueError(f"a plan has {values}, expected 1 to 2**31 devices and numbers of seconds that are not negative")
        for number, pack in enumerate(self.packs.tolist()):
            first_rank, degree, ring, _, _, begin, end = pack
            if not _is_power_of_two(degree) or first_rank + degree > self.devices or ring < 1 or degree % ring or begin > end:
                raise ValueError(
                    f"packs[{number}] is {list(pack)}, expected first_rank, degree, ring, tokens, documents, begin, end, with a degree "
                    f"that is a power of two, ranks below {self.devices}, a ring that divides the degree, and an end after the begin"
                )

    @property
    def work(self) -> np.ndarray:
        """The packs that hold tokens, of type ``PACK``."""
        return self.packs[self.packs["tokens"] > 0]

    @property
    def idle(self) -> float:
        """Share of the ranks' predicted seconds in which they compute no pack."""
        busy = float(((self.work["end"] - self.work["begin"]) * self.work["degree"]).sum())
        return 1 - busy / (self.devices * self.seconds) if self.seconds > 0 else math.nan


@dataclass(frozen=True, kw_only=True)
class ProbeRecord:
    """What happened inside the model in a step, before its update. By depth: in every block, or behind 0, 1, ... blocks.

    NaN where no block of that depth has the site.
    """

    time: float
    step: int
    tokens: int
    widths: dict[str, int]
    """Channels of each site."""
    sites: dict[str, dict[str, list[float]]]
    """Of each site and measure, means over tokens by depth: ``kurtosis_released``, ``kurtosis_centred``, ``max_to_mean``, ``variance``;
    and ``top_channel_share``, the part of all squares in the largest channel."""
    floors: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of each site, what its kurtosis would be if its channels were independent and normal."""
    gradient_norm: list[float] = field(default_factory=list)
    """Of the loss, at the residual stream, behind 0, 1, ... blocks."""
    parameter_gradient_norm: list[float] = field(default_factory=list)
    """Of the parameters of each block, over all ranks and before clipping; NaN where the optimizer does not know it."""
    sink_mass: list[float] = field(default_factory=list)
    """Mean probability that a query gives to the first token of its document, without the first query, by block."""
    sink_mass_uniform: float = math.nan
    """The same for attention that does not distinguish tokens."""
    max_logit: list[float] = field(default_factory=list)
    """Largest attention logit, by block."""

    def __post_init__(self) -> None:
        for site, measures in self.sites.items():
            if site not in self.widths or len({len(values) for values in measures.values()}) > 1:
                raise ValueError(f"sites.{site} has no width, or lists of several lengths")


Record = StartRecord | TrainRecord | EvalRecord | NeedleRecord | EventRecord | PlanRecord | ProbeRecord

_RECORDS: Mapping[str, type] = MappingProxyType(
    {
        "start": StartRecord,
        "train": TrainRecord,
        "eval": EvalRecord,
        "needle": NeedleRecord,
        "event": EventRecord,
        "plan": PlanRecord,
        "probe": ProbeRecord,
    },
)


def parse_record(values: Any) -> Record:
    """Make a record from a JSON object; keys that it does not know are left to other readers.

    Raises:
        ValueError: it is not a record; says why.
    """
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, found {type(values).__name__}")
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in _RECORDS:
        raise ValueError(f"kind is {kind!r}, accepted are {', '.join(_RECORDS)}")
    if kind == "event":
        values = _with_details(values)
    record, hints = _RECORDS[kind], get_type_hints(_RECORDS[kind])
    chosen = {}
    for item in fields(record):
        if item.name in values:
            chosen[item.name] = _checked(item.name, values[item.name], hints[item.name])
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{kind} record without {item.name!r}")
    return record(**chosen)


def _with_details(event: dict[str, Any]) -> dict[str, Any]:
    """An event whose keys that not every event has are under ``details``."""
    everyones = {key: event[key] for key in ("step", "event", "time") if key in event}
    if everyones.get("event") == "checkpoint":  # what old versions called it
        everyones["event"] = "save"
    return everyones | {"details": {key: value for key, value in event.items() if key not in ("kind", "step", "event", "time")}}


def _checked(name: str, value: Any, expected: Any) -> Any:
    """``value`` if it has the type ``expected``; null stands for a number that was not measured."""
    if expected is Any:
        return value
    if expected is float and value is None:
        return math.nan
    if expected is float and (isinstance(value, float) or _is_whole(value)):
        return float(value)
    if expected is int and _is_whole(value):
        return value
    if expected in (str, bool) and isinstance(value, expected):
        return value
    if expected is np.ndarray:
        return _packs(name, value)
    arguments = getattr(expected, "__args__", ())
    if len(arguments) == 2 and isinstance(value, dict):
        return {key: _checked(f"{name}.{key}", item, arguments[1]) for key, item in value.items()}
    if len(arguments) == 1 and isinstance(value, list):
        return [_checked(f"{name}[{number}]", item, arguments[0]) for number, item in enumerate(value)]
    raise ValueError(f"{name} is {value!r}, expected {expected if arguments else expected.__name__}")


def _packs(name: str, value: Any) -> np.ndarray:
    """Packs from a list of lists of whole numbers and, at the end of each, two of seconds."""
    if not isinstance(value, list):
        raise ValueError(f"{name} is {value!r:.80}, expected a list")
    for number, pack in enumerate(value):
        if not (isinstance(pack, list) and len(pack) == len(PACK) and all(map(_is_count, pack[:5])) and all(map(_is_seconds, pack[5:]))):
            raise ValueError(
                f"{name}[{number}] is {pack!r:.80}, expected five numbers from 0 up and two of seconds: {', '.join(PACK.names)}"
            )
    return np.array([tuple(pack) for pack in value], dtype=PACK)


def _is_whole(value: Any) -> bool:
    """A number of 64 bits; JSON has larger ones, and calls true and false something else than Python."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_count(value: Any) -> bool:
    return _is_whole(value) and value >= 0


def _is_seconds(value: Any) -> bool:
    return (isinstance(value, float) or _is_whole(value)) and 0 <= value < math.inf


def _is_power_of_two(number: int) -> bool:
    return number.bit_count() == 1
