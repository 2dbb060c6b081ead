"""Machines and models to simulate: published coefficients, assumed ones, or those of a JSON file.

Published coefficients are those of FlexSP (Wang et al. 2025, arXiv:2412.01523, sections 4.1 and 6), with the digits of its released code:
GPT models with 64 query and 64 key/value heads on A100-40GB, 8 a node, ZeRO-3, contexts of 384 Ki tokens.
"""

import json
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from megatron_ext.errors import ConfigError
from megatron_ext.option_rules import one_of
from megatron_ext.planning.cost_model import AttentionShape, CostModel, Curve

MIB, GIB = 2**20, 2**30
Sharding = Literal["zero3", "owned"]
Preset = TypeVar("Preset", "Hardware", "Model")


@dataclass(frozen=True)
class Hardware:
    """A rank and its links."""

    description: str
    """Where the numbers come from; says ``assumed`` where they are."""
    memory: float
    """Bytes for model states and activations."""
    all_to_all: tuple[float, ...]
    """Effective bytes a second of all-to-alls in blocks of 2, 4, 8 ... ranks: a rank's whole tensor over the time, own part included."""
    ring: float
    """Bytes a second from a rank to the next of a ring."""
    arithmetic: float = 1.0
    """Speed relative to the machine that the model's seconds were measured on."""
    links: float = 1.0
    """Speed at which a node sends parameters and gradients, relative to the same machine."""


@dataclass(frozen=True)
class Model:
    """A model, and the seconds of its forward and backward together on an A100-40GB."""

    description: str
    layers: int
    hidden_size: int
    query_heads: int
    kv_heads: int
    parameters: float
    activation_bytes: float
    """Bytes a token."""
    per_token_squared: float
    """Seconds a squared token of a document."""
    per_token: float
    """Seconds a token."""
    per_pack: float
    """Seconds besides for a micro-batch under ZeRO-3."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    states: float
    """Weights, gradients and what the optimizer keeps."""
    bytes_per_token: float
    limit: float

    @property
    def tokens_per_rank(self) -> int:
        """Tokens that fit beside the states; 0 where the states alone do not fit."""
        return max(0, int((self.limit - self.states) / self.bytes_per_token))

    @property
    def feasible(self) -> bool:
        """At least one token fits."""
        return self.tokens_per_rank > 0

    def peak(self, tokens: int) -> float:
        """Bytes of a rank that computes ``tokens`` tokens at once."""
        return self.states + self.bytes_per_token * tokens

    def __str__(self) -> str:
        room = f"{self.tokens_per_rank} tokens a rank" if self.feasible else "does not fit"
        token = f"{self.bytes_per_token / MIB:.3f} MiB a token"
        return f"{self.states / GIB:.2f} GiB of states, {token}, limit {self.limit / GIB:.1f} GiB: {room}"


def hardware(name: str) -> Hardware:
    """A preset, or the JSON file of this name. Raises ConfigError naming the key that is wrong, or the presets."""
    published = tuple(speed * MIB * 1000 for speed in (119.5, 104.1, 96.5, 10.33, 5.94, 4.87))
    a100 = Hardware("A100-40GB, 8 a node, 400 Gb/s a node: published with FlexSP; ring speed assumed", 30 * GIB, published, 5e9)
    match name:
        case "a100_40g":
            return a100
        case "a100_80g":
            return replace(a100, description="assumed: as a100_40g, with 70 of 80 GiB for states and activations", memory=70 * GIB)
        case "h100":
            speeds = (300e9, 300e9, 300e9, 75e9, 50e9, 42e9)
            words = "assumed, not measured: H100-80GB, 8 a node, 8 x 400 Gb/s a node; arithmetic 2.2 and node links 8 times an A100 node's"
            return Hardware(words, 70 * GIB, speeds, 40e9, arithmetic=2.2, links=8.0)
    return from_json(Hardware, name, ("a100_40g", "a100_80g", "h100"))


def model(name: str, kv_heads: int | None = None) -> Model:
    """A preset, or the JSON file of this name, with other key/value heads where given.

    Raises:
        ConfigError: naming the key that is wrong, or the presets.
    """
    match name:
        case "7b":
            found = gpt(32, 4096, 7.8498687744140625, 4.480441895, 5.128e-9, 0.1839576e-3, 0.6293563)
        case "13b":
            found = gpt(40, 5120, 14.03158187866211, 4.220439453, 9.2852e-9, 0.3060189e-3, 1.1325632)
        case "30b":
            found = gpt(60, 6656, 32.71532440185547, 3.417381836, 15.4262e-9, 0.8035742e-3, 2.7893644)
        case _:
            found = from_json(Model, name, ("7b", "13b", "30b"))
    if kv_heads is None:
        return found
    if kv_heads < 1 or found.query_heads % kv_heads:
        raise ConfigError(f"kv_heads: {kv_heads}; accepted: a divisor of the {found.query_heads} query heads")
    # Where a published model is changed, its projections would cost a little less; that is left out.
    return replace(found, kv_heads=kv_heads, description=f"{found.description}; assumed: {kv_heads} key/value heads")


def gpt(layers: int, hidden: int, parameters: float, activations: float, squared: float, token: float, pack: float) -> Model:
    """A model of FlexSP's release: parameters in units of 2**30, activations in MiB a token, seconds."""
    return Model("published with FlexSP", layers, hidden, 64, 64, parameters * GIB, activations * MIB, squared, token, pack)


def memory(machine: Hardware, shape: Model, devices: int, sharding: Sharding) -> Memory:
    """What a rank's memory holds.

    Args:
        machine: whose limit counts.
        shape: whose parameters and activations count.
        devices: number of data ranks N.
        sharding: ``zero3``: 16 bytes a parameter over N; ``owned``: bfloat16 weights and float32 gradients on every rank, and over N the
            owned float32 master and moments.

    Raises:
        ConfigError: an unknown sharding.
    """
    if sharding not in get_args(Sharding):
        raise ConfigError(f"sharding: {sharding!r}; accepted: {', '.join(get_args(Sharding))}")
    bytes_per_parameter = 16 / devices if sharding == "zero3" else 2 + 4 + 12 / devices
    return Memory(bytes_per_parameter * shape.parameters, shape.activation_bytes, machine.memory)


def cost_model(machine: Hardware, shape: Model, devices: int, sharding: Sharding) -> CostModel:
    """What a planner believes about a model on a machine.

    The published ``per_pack`` is what ZeRO-3 spends on parameters and gradients for every micro-batch. With owned states they travel once a
    step: it is charged to the step, and 5 % of it (assumed) remain for each pack.

    Raises:
        ConfigError: the states alone do not fit.
    """
    room = memory(machine, shape, devices, sharding)
    if not room.feasible:
        raise ConfigError(
            f"memory: {sharding} states of {room.states / GIB:.1f} GiB on each of {devices} ranks leave no room for tokens; "
            f"accepted: states below {room.limit / GIB:.1f} GiB"
        )
    fixed = shape.per_pack / machine.links
    # All-to-alls are charged for what a rank sends to others, published speeds are of its whole tensor.
    sizes = [2 << power for power in range(len(machine.all_to_all))]
    curves = tuple(Curve.line(0.0, speed * (size - 1) / size) for speed, size in zip(machine.all_to_all, sizes, strict=True))
    return CostModel(
        tokens_per_rank=room.tokens_per_rank,
        per_token=shape.per_token / machine.arithmetic,
        per_token_squared=shape.per_token_squared / machine.arithmetic,
        per_pack=fixed if sharding == "zero3" else 0.05 * fixed,
        per_step=0.0 if sharding == "zero3" else fixed,
        attention=AttentionShape(shape.layers, shape.query_heads, shape.kv_heads, shape.hidden_size // shape.query_heads),
        all_to_all=curves,
        ring_step=Curve.line(0.0, machine.ring),
    )


def from_json(kind: type[Preset], path: str, presets: tuple[str, ...]) -> Preset:
    """An object of ``kind`` from a JSON file of its fields; lists of numbers for tuples."""
    names = one_of(presets, path)
    if not path.endswith(".json"):
        raise ConfigError(f"{kind.__name__.lower()}: {path!r}; accepted: {names}, or a JSON file")
    try:
        found: Any = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}; accepted: a JSON file with the fields of {kind.__name__}") from error
    known = {field.name: field for field in fields(kind)}
    keys = set(found) if isinstance(found, dict) else set()
    for key in sorted(keys - set(known)):
        raise ConfigError(f"{path}: {key}: unknown key; accepted: {one_of(known, key)}")
    for key, field in known.items():
        if key not in keys and field.default is MISSING:
            raise ConfigError(f"{path}: {key}: missing; accepted: {wanted(field.type)}")
    return kind(**{key: checked(path, key, known[key].type, value) for key, value in found.items()})


def wanted(kind: Any) -> str:
    """What a field of this type accepts, in words."""
    return {str: "a text", int: "a positive whole number", float: "a positive number"}.get(kind, "a list of positive numbers")


def checked(path: str, key: str, kind: Any, value: Any) -> Any:
    """``value`` as the type of its field. Raises ConfigError where it is not."""

    def is_number(number: Any) -> bool:
        whole = kind is int
        return not isinstance(number, bool) and isinstance(number, int if whole else int | float) and 0 < number < float("inf")

    if kind is str:
        fits = isinstance(value, str)
    elif kind in (int, float):
        fits = is_number(value)
    else:
        fits = isinstance(value, list) and bool(value) and all(map(is_number, value))
    if not fits:
        raise ConfigError(f"{path}: {key}: {value!r}; accepted: {wanted(kind)}")
    return tuple(value) if isinstance(value, list) else value
