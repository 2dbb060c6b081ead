"""Losses of the checkpoints of a study after training, measured once and written beside each run with the settings of the measure."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from megatron_ext.atomic_io import write_json
from megatron_ext.config.study import StudyRun
from megatron_ext.report.study import Variant


def chosen_runs(planned: Sequence[StudyRun], variants: Sequence[Variant], what: str, console: Console) -> Iterator[StudyRun]:
    """The runs at the best value of each variant, with a bar that says ``what`` is done with them."""
    chosen = {run.directory for variant in variants for run in variant.runs}
    runs = [run for run in planned if run.directory in chosen]
    yield from track(runs, what, console=console, disable=not console.is_terminal, transient=True)


def measure_once(path: Path, settings: Mapping[str, Any], losses: Callable[[], Mapping[str, float]]) -> None:
    """Write ``settings`` and ``losses`` to ``path``, unless a file with these settings lies there."""
    if not path.exists() or json.loads(path.read_text("utf-8"))["settings"] != settings:
        write_json(path, {"settings": settings, "losses": losses()})
