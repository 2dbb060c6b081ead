"""What a run writes and says: metrics.jsonl, events.jsonl, the monitors and the console, each fact in the form that each of them wants."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_ext.config import RunConfig, monitor_config, total_steps
from megatron_ext.report.forgetting import described
from megatron_ext.report.metrics import read_evaluations
from megatron_ext.train.console import Console
from megatron_ext.train.data_events import DataEvent
from megatron_ext.train.evaluation import EvaluationResult
from megatron_ext.train.metrics import METRICS_FILE, MetricsWriter
from megatron_ext.train.monitors import Monitors
from megatron_ext.train.needle_evaluation import NeedleResult
from megatron_ext.train.probes import Reading


class Recorder:
    """Records a run on rank 0; on the others it does nothing. Made after DeepSpeed has joined the process group.

    Args:
        config: of the run.
        step: that the run stands at; what metrics say of later ones is dropped, because they are computed again.
        active: False on ranks that do not write.
    """

    def __init__(self, config: RunConfig, step: int, active: bool) -> None:
        self._config, self._active = config, active
        self._run_dir = Path(config.run_dir)
        self.monitors = Monitors(monitor_config(config), self._run_dir)
        self.console = Console(active, total_steps(config))
        self.metrics = MetricsWriter(self._run_dir, step, active)

    def start(self, banner: Mapping[str, str], record: Mapping[str, Any]) -> None:
        """The run begins or goes on."""
        self.console.say(f"megatron_ext {version('megatron_ext')}: {self._run_dir}")
        self.console.banner(banner)
        self.metrics.write("start", run=self._run_dir.name, **record)

    def event(self, step: int, tokens: int, event: DataEvent) -> None:
        """Something that happened."""
        self.metrics.write("event", event=event.name, step=step, tokens=tokens, **event.fields)
        self.console.say(f"step {step}: {event.message}")

    def step(self, record: Mapping[str, Any], step_tokens: int, flops: float, picture: Callable[[], Mapping[str, Any]] | None) -> None:
        """A training step.

        Args:
            record: for metrics.jsonl.
            step_tokens: of the step.
            flops: a token, for documents as long as those of the step.
            picture: makes that of the plan where it is the turn of this step to be shown; otherwise None.
        """
        step = record["step"]
        self.metrics.write("train", **record)
        self.monitors.write([(f"train/{key}", record[key], step) for key in ("loss", "lr", "grad_norm", "tokens_per_second")])
        self.console.count(step_tokens)
        if picture is not None:
            self.console.step_line(record, flops)
            if self._active and (drawn := picture()):
                self.metrics.write("plan", step=step, **drawn)

    def probe(self, step: int, tokens: int, reading: Reading) -> None:
        """What the probes saw in a step."""
        self.metrics.write("probe", step=step, tokens=tokens, **reading.record)
        self.monitors.write([(name, value, step) for name, value in reading.events()])

    def evaluation(self, step: int, tokens: int, results: Sequence[EvaluationResult]) -> None:
        """Losses of validation sets."""
        buckets = bool(self._config.evaluation.position_buckets)
        for each in results:
            by_position = {"by_position": [asdict(bucket) for bucket in each.by_position]} if buckets else {}
            values = {"source": each.source, "split": each.split, "loss": each.loss, "eval_tokens": each.tokens, **by_position}
            self.metrics.write("eval", step=step, tokens=tokens, **values)
        self.monitors.write([(f"{each.split}/{each.source}", each.loss, step) for each in results])
        if results:
            losses = ", ".join(f"{each.source} {each.loss:.4f}" for each in results)
            self.console.say(f"step {step}: {results[0].split} loss {losses}")

    def needles(self, step: int, tokens: int, result: NeedleResult) -> None:
        """Needles that were looked for."""
        shares = list(zip(result.lengths, result.mean_exact, strict=True))
        self.metrics.write("needle", step=step, tokens=tokens, **asdict(result))
        self.monitors.write([(f"needle/{length}", share, step) for length, share in shares])
        self.console.say(f"step {step}: needles found {', '.join(f'{share:.0%} at {length:,}' for length, share in shares)} tokens")

    def forgotten(self, trained: Sequence[str]) -> None:
        """What the run has forgotten of each source; ``trained`` are those that it has read."""
        if self._active:
            new = [source.name for source in self._config.data.sources]
            for line in described(read_evaluations(self._run_dir / METRICS_FILE), trained, new):
                self.console.say(line)
