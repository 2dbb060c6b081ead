"""Which parameter gets which update rule, from names and shapes."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from megatron_ext.errors import ConfigError
from megatron_ext.optim.options import OptimizerOptions, RuleName

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
"""Matrices whose rows are tokens: orthogonalized only where a route says so."""
Shapes = Mapping[str, Sequence[int]]


def route(shapes: Shapes, options: OptimizerOptions) -> dict[str, RuleName]:
    """The rule of every parameter, by name.

    Args:
        shapes: of all parameters of the model, whole.
        options: ``rule`` decides by shape and name, ``routes`` over it.

    Raises:
        ConfigError: a rule ends up with nothing, a pattern fits no parameter, or a rule that needs matrices gets something else.
    """
    routes = {name: _usual_rule(name, shape, options.rule) for name, shape in shapes.items()}
    for pattern, rule in options.routes.items():
        fitting = [name for name in shapes if fnmatchcase(name, pattern)]
        if not fitting:
            raise ConfigError(f"optimizer.routes: {pattern!r} fits no parameter; nearest: {_nearest(pattern, shapes)}")
        odd = next((name for name in fitting if rule != "adamw" and len(shapes[name]) != 2), None)
        if odd is not None:
            raise ConfigError(
                f"optimizer.routes: {pattern!r} gives {rule} to {odd} {list(shapes[odd])}; accepted are matrices, and adamw for all else"
            )
        routes |= dict.fromkeys(fitting, rule)
    missing = sorted(options.rules - set(routes.values()))
    if missing:
        raise ConfigError(f"optimizer: {', '.join(missing)} is asked for, but no parameter is left for it by the routes {options.routes}")
    return routes


def _usual_rule(name: str, shape: Sequence[int], rule: RuleName) -> RuleName:
    if len(shape) != 2 or (name in EMBEDDINGS and rule in ("muon", "normuon")):
        return "adamw"
    return rule


def _nearest(pattern: str, names: Iterable[str]) -> str:
    """The name whose end is most like the pattern."""
    ends = {".".join(name.split(".")[-count:]): name for name in names for count in range(1, name.count(".") + 2)}
    return ends[difflib.get_close_matches(pattern.strip("*."), ends, n=1, cutoff=0.0)[0]]


@dataclass(frozen=True)
class RouteSummary:
    """What one rule got."""

    rule: RuleName
    tensors: int
    parameters: int
    examples: tuple[str, ...]
    """Names with numbers of layers replaced by ``*``, each once."""

    def __str__(self) -> str:
        more = f" and {len(self.examples) - 3} more" if len(self.examples) > 3 else ""
        return f"{self.tensors} tensors, {self.parameters:,} parameters: {', '.join(self.examples[:3])}{more}"


def summarize_routes(routes: Mapping[str, RuleName], shapes: Shapes) -> list[RouteSummary]:
    """What each rule got, the one with most parameters first."""
    summaries = []
    for rule in dict.fromkeys(routes.values()):
        names = [name for name in routes if routes[name] == rule]
        general = tuple(dict.fromkeys(".".join("*" if word.isdigit() else word for word in name.split(".")) for name in names))
        summaries.append(RouteSummary(rule, len(names), sum(prod(shapes[name]) for name in names), general))
    return sorted(summaries, key=lambda summary: -summary.parameters)
