"""From where a run goes on, and what it says of itself before its first step."""

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from megatron_ext.config import Change, RunConfig, total_steps
from megatron_ext.errors import ConfigError
from megatron_ext.parallel.device import describe
from megatron_ext.parallel.grid import Grid
from megatron_ext.report.digests import DIGESTS_FILE
from megatron_ext.train.banner import describe_run
from megatron_ext.train.build import Setup
from megatron_ext.train.data_events import DataEvent
from megatron_ext.train.events import start_event
from megatron_ext.train.ledger import FOLDER
from megatron_ext.train.metrics import METRICS_FILE
from megatron_ext.train.recorder import Recorder


@dataclass(frozen=True)
class Beginning:
    """From nothing, or from a checkpoint."""

    checkpoint: Path | None = None
    branched: bool = False
    """Another run's, whose directory stays as it is."""
    overrides: tuple[Change, ...] = ()
    """Settings that are others than when it was saved."""
    state_changes: tuple[str, ...] = ()
    """What of the optimizer could not be kept."""
    overwritten: tuple[str, ...] = ()
    """Records of an earlier run in the directory that a run from nothing begins anew."""

    def described(self) -> dict[str, str]:
        """Lines of the banner."""
        return {
            **({"branched from" if self.branched else "resumed from": str(self.checkpoint)} if self.checkpoint else {}),
            **({"changed": "; ".join(map(str, self.overrides))} if self.overrides else {}),
            **({"optimizer state": "; ".join(self.state_changes)} if self.state_changes else {}),
        }


def from_nothing(run_dir: Path) -> Beginning:
    """In a directory that may hold what an earlier run wrote of its steps."""
    return Beginning(overwritten=tuple(name for name in (METRICS_FILE, DIGESTS_FILE, FOLDER) if (run_dir / name).exists()))


def check_branch(config: RunConfig, checkpoint: Path, step: int) -> None:
    """A run that branches off ``checkpoint``, of ``step``, has something left to do.

    Raises:
        ConfigError: its steps, or those of distillation, are behind it already.
    """
    steps, distillation = total_steps(config), config.distillation
    if step >= steps:
        raise ConfigError(f"train.steps: {steps}; accepted: more than the {step} steps of {checkpoint}, which the run branches off")
    if distillation is not None and distillation.factor(step + 1) == 0:
        raise ConfigError(
            f"distillation.decay_steps: {distillation.decay_steps}; accepted: null, or more than the {step} steps of {checkpoint}, which "
            "the run branches off and which count"
        )


def introduce(
    recorder: Recorder, beginning: Beginning, setup: Setup, grid: Grid, dtype: torch.dtype, chosen: dict[str, str], step: int, tokens: int
) -> None:
    """Print the banner, write the start record and the events of a beginning. All ranks call it.

    Args:
        recorder: of the run.
        beginning: from where it goes on.
        setup: what it is made of.
        grid: of its ranks.
        dtype: of its parameters.
        chosen: what it decided by itself, and why, by name.
        step: at which it stands.
        tokens: that it has seen.
    """
    config, world = setup.config, grid.world
    entropy = {each.name: each.unigram_entropy() for each in setup.validation} if world.is_main else {}
    told_entropy = {"unigram entropy": ", ".join(f"{name} {value:.3f}" for name, value in entropy.items())} if entropy else {}
    place = {"step": step, "tokens": tokens}
    record = {
        **place,
        "ranks": world.size,
        "grid": asdict(grid.shape),
        "parameters": setup.model.num_parameters(),
        "total_steps": total_steps(config),
        "tokens_per_step": config.data.tokens_per_step,
        "device": describe(world.device),
        "dtype": chosen["dtype"].split()[0],
        "branched_from": str(beginning.checkpoint) if beginning.branched else None,
        "attention": chosen["attention"].split()[0],
        "unigram_entropy": entropy,
        "versions": versions(),
    }
    recorder.start({**describe_run(setup, grid, dtype), **chosen, **told_entropy, **beginning.described()}, record)
    start = world.on_main(start_event(Path(config.run_dir)) if world.is_main else None)
    recorder.metrics.write("event", **start, **place, ranks=world.size, total_steps=total_steps(config))
    _tell_changes(recorder, beginning, step, tokens)


def _tell_changes(recorder: Recorder, beginning: Beginning, step: int, tokens: int) -> None:
    write, files = recorder.metrics.write, list(beginning.overwritten)
    if beginning.checkpoint is not None:
        write("event", event="branch" if beginning.branched else "resume", step=step, tokens=tokens, path=str(beginning.checkpoint))
    if files:
        what = f"{', '.join(files)} of an earlier run in the directory begin anew; its events stay"
        recorder.event(step, tokens, DataEvent("overwrite", {"files": files}, f"this run begins from nothing: {what}"))
    if beginning.state_changes:
        write("event", event="state_change", step=step, changes=list(beginning.state_changes))
    if beginning.overrides:
        write("event", event="override", step=step, changes={key: [old, new] for key, old, new in beginning.overrides})


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what a run computes."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("megatron_ext", "torch", "deepspeed")}}
