"""What a study is: variants of one run, a key that is swept for each, and several seeds."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_ext.config.files import files_of
from megatron_ext.config.load import load_config
from megatron_ext.config.messages import problems_of
from megatron_ext.config.schema import RunConfig
from megatron_ext.config.tree import ConfigTree
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.option_rules import Problem, one_of, require, shown

_DECIDED_BY_THE_STUDY = ("run_dir", "seed")
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

VariantName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _+-]{0,39}$")]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class StudyVariant(BaseModel):
    """One of the things that are compared."""

    model_config = _STRICT

    overrides: list[str] = Field(default_factory=list)
    """``dotted.path=value``, as on the command line of examples/pretrain.py; applied after those of the study."""
    sweep: dict[str, list[float]] = Field(default_factory=dict)
    """The dotted path that is swept and its values, increasing; empty: nothing is swept."""

    @property
    def swept_key(self) -> str | None:
        """Dotted path of the sweep, if there is one."""
        return next(iter(self.sweep), None)

    @property
    def swept_values(self) -> list[float] | list[None]:
        """Values of the sweep; without one, the one value None."""
        return next(iter(self.sweep.values()), [None])

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(*_override_rules(self.overrides), (len(self.sweep) <= 1, "sweep", list(self.sweep), "one key"))
        if self.sweep:
            key, values = next(iter(self.sweep.items()))
            path = f"sweep.{key}"
            increasing = len(values) >= 2 and all(low < high for low, high in pairwise(values))
            require(
                (key not in _DECIDED_BY_THE_STUDY, path, values, "another key: the study decides this one"),
                (increasing, path, values, "two or more numbers, each larger than the one before"),
                (key not in map(_key_of, self.overrides), "overrides", self.overrides, f"no {key}, because it is swept"),
            )
        return self


class StudyQuantization(BaseModel):
    """Quantization of every final model, without any training."""

    model_config = _STRICT

    schemes: list[str] = Field(min_length=1)
    """As ``tools/quantize.py --schemes`` takes them."""
    data: str | None = None
    """Prefix of the .bin/.idx pair to evaluate on; null: the first of ``data.validation``."""
    tokens: int = Field(default=65536, ge=1)
    """Of it, to evaluate on."""


class StudyAveraging(BaseModel):
    """The mean of the weights of the last checkpoints of every run, evaluated as the run evaluates."""

    model_config = _STRICT

    last: int = Field(ge=2)
    """Checkpoints, at most ``checkpoint.keep_last`` of the runs."""


class Study(BaseModel):
    """A comparison of variants by their final validation loss: the best value of each sweep at the first seed, then at all seeds."""

    model_config = _STRICT

    title: str = Field(min_length=1)
    """Heading of the page."""
    config: str = Field(min_length=1)
    """YAML file of the run that is varied."""
    overrides: list[str] = Field(default_factory=list)
    """``dotted.path=value`` for all runs."""
    prepare: str | None = None
    """Command that makes the data, to be named where they are missing."""
    quantization: StudyQuantization | None = None
    """Also compare the losses of the last checkpoints after quantization; null: they are not quantized."""
    averaging: StudyAveraging | None = None
    """Also compare the losses of averages of the last checkpoints; null: they are not averaged."""
    seeds: list[Seed] = Field(min_length=1)
    """Decide initial weights and order of the data. The first is that of the sweeps."""
    variants: dict[VariantName, StudyVariant] = Field(min_length=1)
    """By name; the first is what the others are compared with."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        repeated = [seed for seed, times in Counter(self.seeds).items() if times > 1]
        require(*_override_rules(self.overrides), (not repeated, "seeds", self.seeds, "numbers that differ"))
        return self


@dataclass(frozen=True)
class StudyRun:
    """One run of a study, resolved and checked."""

    variant: str
    key: str | None
    """Dotted path that is swept, if any."""
    value: float | None
    """Value at ``key``."""
    seed: int
    overrides: tuple[str, ...]
    """All of them, in the order in which they are applied."""
    config: RunConfig

    @property
    def directory(self) -> Path:
        """Of everything that the run writes."""
        return Path(self.config.run_dir)

    def __str__(self) -> str:
        swept = "" if self.value is None else f", {self.key} {_text_of(self.value)}"
        return f"{self.variant}{swept}, seed {self.seed}"


def read_study(path: str | Path) -> Study:
    """Read the YAML file of a study.

    Raises:
        ConfigError: with a line for every problem: file and line, dotted path, value seen, what is accepted.
    """
    tree = ConfigTree.read(path)
    try:
        return Study.model_validate_json(json.dumps(tree.values))
    except ValidationError as error:
        problems = map(_in_words, problems_of(error))
        raise ConfigError("\n".join(f"{tree.place(problem.key)}: {problem}" for problem in problems)) from error


def plan_runs(path: str | Path, study: Study, output: Path) -> list[StudyRun]:
    """Every run that may become part of ``study``: each variant, at each value of its sweep, at each seed.

    Raises:
        ConfigError: the configuration of one of them, or what it would be measured by, is wrong; names the study's file and the run.
    """
    return [
        _resolve(path, study, name, value, seed, output)
        for name, variant in study.variants.items()
        for value in variant.swept_values
        for seed in study.seeds
    ]


def _resolve(path: str | Path, study: Study, name: str, value: float | None, seed: int, output: Path) -> StudyRun:
    variant = study.variants[name]
    key = variant.swept_key
    swept = [] if value is None else [f"{key}={_text_of(value)}"]
    directory = output / "runs" / name / (swept[0] if swept else "default") / f"seed_{seed}"
    decided = [f"seed={seed}", f"run_dir={json.dumps(str(directory))}"]
    overrides = (*study.overrides, *variant.overrides, *swept, *decided)
    try:
        config = load_config(study.config, overrides)
        validated = config.data.validation or config.data.validation_fraction
        evaluated = study.quantization is None or bool(study.quantization.data or config.data.validation)
        kept, wanted = config.checkpoint.keep_last, study.averaging.last if study.averaging else 1
        enough = not study.averaging or bool(config.data.validation)
        require(
            (kept >= wanted, "checkpoint.keep_last", kept, f"at least averaging.last ({wanted})"),
            (enough, "data.validation", [], "corpora to evaluate averages on"),
            (bool(validated), "data.validation", [], "corpora, or data.validation_fraction: the best value has the lowest loss on them"),
            (evaluated, "data.validation", [], "a corpus to evaluate quantized models on, or quantization.data"),
        )
    except ConfigError as error:
        swept_here = f", {swept[0]}" if swept else ""
        raise ConfigError(f"{path}: variants.{name}{swept_here}, seed {seed}:\n{error}") from error
    return StudyRun(name, key, value, seed, overrides, config)


def check_files(run: StudyRun, prepare: str | None) -> None:
    """Check that tokenizer, weights and corpora of a run are there.

    Raises:
        DataError: one is missing; names the key, the path and, where the study knows it, the command that makes it.
    """
    for key, path in files_of(run.config):
        if not path.exists():
            hint = f"; make it with: {prepare}" if prepare else ""
            raise DataError(f"{path}: no such file or directory, needed by {key} of the run {run}{hint}")


def _override_rules(overrides: list[str]) -> Iterator[tuple[bool, str, object, str]]:
    for index, text in enumerate(overrides):
        yield "=" in text, f"overrides.{index}", text, "dotted.path=value"
        yield _key_of(text) not in _DECIDED_BY_THE_STUDY, f"overrides.{index}", text, "another key: the study decides this one"


def _key_of(override: str) -> str:
    return override.partition("=")[0].strip()


def _in_words(problem: Problem) -> Problem:
    """A problem of a study, where ``problems_of`` knows the keys of a run instead or speaks of patterns."""
    *section, name = problem.key.split(".")
    if name == "[key]":
        accepted = "a name of at most 40 letters, digits, spaces, _, + and -, a letter or digit first"
        return Problem(".".join(section), shown(section[-1]), accepted)
    if problem.found.startswith("no such key"):
        known = StudyVariant.model_fields if len(section) == 2 else Study.model_fields
        return problem._replace(accepted=one_of(known, name))
    return problem


def _text_of(value: float) -> str:
    """Of a number such that the configuration reads it as an integer where it is one."""
    return str(int(value)) if value.is_integer() else repr(value)
