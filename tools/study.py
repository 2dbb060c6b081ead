#!/usr/bin/env python3
"""Compare variants of a run: sweep each at the first seed, run the best of each at all seeds, write a page about it.

    python tools/study.py examples/studies/optimizers.yaml --output runs/optimizers

Finished runs are kept, so that the same command continues a study that was stopped, and only writes the page of one that is done.
"""

import argparse
import fcntl
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from study_averaging import average_runs
from study_quantization import check_schemes, quantize_runs
from study_runner import Runner, RunStopped, pretrain_command

from megatron_ext.config import load_config
from megatron_ext.config.study import Study, StudyRun, check_files, plan_runs, read_study
from megatron_ext.errors import ConfigError, MegatronExtError
from megatron_ext.report.metrics import Run
from megatron_ext.report.study import Variant, best_value
from megatron_ext.report.study_console import print_study
from megatron_ext.report.study_page import write_study


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; the result is its exit status: 0, 1 after an error, 130 when it was asked to stop."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console(highlight=False)
    try:
        study = read_study(options.study)
        if study.quantization is not None:
            check_schemes(options.study, study.quantization)
        planned = plan_runs(options.study, study, options.output)
        for run in planned:
            check_files(run, study.prepare)
            check_unchanged(run)
        with sole_user(options.output) as lock:
            variants = run_study(study, planned, Runner(study, options.parallel, lock, console))
            if study.quantization is not None:
                quantize_runs(study.quantization, planned, variants, console)
            if study.averaging is not None:
                average_runs(study.averaging, planned, variants, console)
            page = options.output / "index.html"
            write_study(study.title, variants, page)
    except KeyboardInterrupt:
        print("stopped; start the same command again to continue", file=sys.stderr)
        return 130
    except (MegatronExtError, RunStopped, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_study(variants, console)
    console.print(f"study: {page}", markup=False, soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, metavar="STUDY.yaml", help="what is compared; see examples/studies")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the runs and index.html go")
    parser.add_argument("--parallel", type=_positive, default=1, metavar="N", help="runs at a time, which share the cores (default: 1)")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: a number, at least 1")
    return int(text)


@contextmanager
def sole_user(output: Path) -> Iterator[int]:
    """Hold ``output`` for this study; yields the lock's descriptor. Runs inherit it, so that those of a killed study hold it to their end.

    Raises:
        ConfigError: another study, or a run that one left behind, holds it.
    """
    output.mkdir(parents=True, exist_ok=True)
    with open(output / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{output}: in use by another study, or by a run that one left behind; wait for it or end it") from None
        yield file.fileno()


def check_unchanged(run: StudyRun) -> None:
    """Check that what lies in the run's directory was made with the run's configuration; the threads of a rank may differ.

    Raises:
        ConfigError: names the keys that differ.
    """
    path = run.directory / "config.yaml"
    if not path.exists():
        return
    before, now = (_flat(config.model_dump(mode="json")) for config in (load_config(path), run.config))
    free = ("train.threads_per_rank", "run_dir")
    changed = [key for key in now | before if before.get(key) != now.get(key) and key not in free]
    if changed:
        words = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed[:3])
        raise ConfigError(f"{path}: made with another configuration: {words}; remove {run.directory} or choose another --output")


def _flat(values: object, prefix: str = "") -> dict[str, object]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {path: item for key, value in values.items() for path, item in _flat(value, f"{prefix}.{key}" if prefix else key).items()}


def run_study(study: Study, planned: Sequence[StudyRun], runner: Runner) -> list[Variant]:
    """Run the sweeps at the first seed, then the best value of each at the other seeds.

    Raises:
        RunStopped: a run failed or was stopped by another than this study.
        DataError: no value of a sweep ended with a finite loss.
    """
    first = study.seeds[0]
    swept = [run for run in planned if run.seed == first]
    results = dict(zip(map(_key_of, swept), runner.run(swept), strict=True))
    best = {name: _best_of(name, study, results) for name in study.variants}
    others = [run for run in planned if run.seed != first and run.value == best[run.variant]]
    results |= zip(map(_key_of, others), runner.run(others), strict=True)
    commands = {_key_of(run): shlex.join(["python", "examples/pretrain.py", *pretrain_command(study, run)]) for run in swept}
    return [
        Variant(
            name=name,
            key=variant.swept_key,
            sweep={value: results[name, value, first] for value in variant.swept_values if value is not None},
            seeds={seed: results[name, best[name], seed] for seed in study.seeds},
            command=commands[name, best[name], first],
        )
        for name, variant in study.variants.items()
    ]


Key = tuple[str, float | None, int]


def _key_of(run: StudyRun) -> Key:
    return run.variant, run.value, run.seed


def _best_of(name: str, study: Study, results: dict[Key, Run]) -> float | None:
    sweep = {value: results[name, value, study.seeds[0]] for value in study.variants[name].swept_values}
    return None if None in sweep else best_value(sweep)


if __name__ == "__main__":
    sys.exit(main())
