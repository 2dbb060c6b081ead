#!/usr/bin/env python3
"""Evaluate an exported checkpoint: loss and perplexity on text by position, and the tasks of lm-eval.

    python tools/evaluate.py --model runs/mine/checkpoints/step_00001000 --data data/prose_text_document data/code_text_document
    python tools/evaluate.py --model runs/mine/checkpoints/step_00001000 --tasks lambada_openai arc_easy --limit 200

With --local-tokens the texts of --data may be longer than those of training: each token sees the first and the last tokens only, at
distances that training knew (LM-Infinite).

Tasks need the extra: pip install 'megatron_ext[eval]'. They load their data as lm-eval does; --include-path adds tasks of your own.
Prompts are packed, not padded, which changes no result.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_ext.atomic_io import write_json
from megatron_ext.config.run_options import EvaluationOptions
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.errors import ConfigError, MegatronExtError
from megatron_ext.model.gpt import GPT
from megatron_ext.model.window_options import WindowOptions
from megatron_ext.parallel.device import DTYPES, describe, local_device
from megatron_ext.train.evaluation import EvaluationResult, evaluate_alone
from megatron_ext.train.evaluation_packs import evaluation_packs
from megatron_ext.train.quantized_model import build_rotated, read_weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; the result is its exit status: 0, or 1 after an error of the input."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False, markup=False)
    try:
        _check(options)
        result = _evaluate(options, console)
        write_json(options.output, result)
    except (MegatronExtError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console.print(f"results: {options.output}", soft_wrap=True)
    return 0


def _check(options: argparse.Namespace) -> None:
    EvaluationOptions(tokens=options.tokens, position_buckets=options.position_buckets)
    if not (options.data or options.tasks):
        raise ConfigError("nothing to evaluate; accepted: --data, --tasks, or both")
    if min(options.sequence_length or 2, options.tokens_per_pack) < 2:
        numbers = f"--sequence-length {options.sequence_length} --tokens-per-pack {options.tokens_per_pack}"
        raise ConfigError(f"{numbers}; accepted: at least 2")
    _window(options)
    if not options.output.absolute().parent.is_dir():
        raise ConfigError(f"--output {options.output}: there is no directory {options.output.parent}")


def _evaluate(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    device = local_device()
    weights, config = read_weights(options.model)
    model = build_rotated(weights, config, "none", 0, device, DTYPES[options.dtype])
    model.window = _window(options)
    sees = f"; attention: {model.window}" if model.window else ""
    console.print(f"{options.model}: {config.num_parameters():,} parameters, {options.dtype}, {describe(device)}{sees}", soft_wrap=True)
    losses = [_loss(options, model, data) for data in options.data]
    if losses:
        console.print(_loss_table(losses))
    tasks = _run_tasks(options, model) if options.tasks else {}
    if tasks:
        console.print(_task_table(tasks))
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    return {"settings": settings, "losses": [{**asdict(each), "perplexity": each.perplexity} for each in losses], "tasks": tasks}


def _window(options: argparse.Namespace) -> WindowOptions | None:
    if options.local_tokens is None and options.global_tokens is not None:
        raise ConfigError(f"--global-tokens {options.global_tokens}; accepted: only with --local-tokens, which opens the window")
    if options.local_tokens is None:
        return None
    given = {} if options.global_tokens is None else {"global_tokens": options.global_tokens}
    return WindowOptions(options.local_tokens, **given)


def _loss(options: argparse.Namespace, model: GPT, data: str) -> EvaluationResult:
    longest = model.config.max_position
    length = options.sequence_length or longest
    if length > longest and model.window is None:
        raise ConfigError(f"--sequence-length {length}; accepted: at most the {longest} tokens that the model takes, or --local-tokens")
    packs = evaluation_packs(data, options.tokenizer or options.model, length, options.tokens, model.config.vocab_size)
    device = next(model.parameters()).device
    return evaluate_alone(model, Path(data).name, [pack.to(device) for pack in packs], options.position_buckets)


def _run_tasks(options: argparse.Namespace, model: GPT) -> dict[str, dict[str, Any]]:
    """Metrics by task, as lm-eval names them.

    Raises:
        ConfigError: lm-eval is not installed, or does not know a task.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager

        from megatron_ext.train.lm_eval_model import PackedModel
    except ImportError as error:
        raise ConfigError(f"--tasks needs lm-eval: pip install 'megatron_ext[eval]' ({error})") from error
    manager = TaskManager(include_path=options.include_path and str(options.include_path))
    if unknown := [task for task in options.tasks if not manager.match_tasks([task])]:
        raise ConfigError(f"--tasks {unknown[0]}: lm-eval knows no such task; `lm-eval ls tasks` lists all")
    answers = PackedModel(model, load_tokenizer(options.tokenizer or options.model), options.tokens_per_pack)
    found = lm_eval.simple_evaluate(
        model=answers, tasks=options.tasks, num_fewshot=options.num_fewshot, limit=options.limit, task_manager=manager, log_samples=False
    )
    return {task: {key: value for key, value in metrics.items() if key != "alias"} for task, metrics in found["results"].items()}


def _loss_table(losses: Sequence[EvaluationResult]) -> Table:
    table = Table(title="Loss in nats a token, by position in the document")
    buckets = sorted({(bucket.start, bucket.stop or sys.maxsize) for each in losses for bucket in each.by_position})
    for name in (
        "data",
        "tokens",
        "loss",
        "perplexity",
        *(f"{start:,}-{'' if stop == sys.maxsize else f'{stop:,}'}" for start, stop in buckets),
    ):
        table.add_column(name, justify="left" if name == "data" else "right", overflow="fold")
    for each in losses:
        by_start = {bucket.start: f"{bucket.loss:.4f}" for bucket in each.by_position}
        cells = (by_start.get(start, "") for start, _ in buckets)
        table.add_row(Text(each.source), f"{each.tokens:,}", f"{each.loss:.4f}", f"{each.perplexity:.4g}", *cells)
    return table


def _task_table(tasks: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="lm-eval")
    for name in ("task", "metric", "value", "stderr"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right", overflow="fold")
    for task, metrics in tasks.items():
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if isinstance(value, float) and not name.endswith("_stderr"):
                error = metrics.get(f"{name}_stderr,{kind}")
                table.add_row(Text(task), name, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else "")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, required=True, help="directory of a Hugging Face checkpoint, such as a step directory of a run"
    )
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="DATA", help="prefixes of .bin/.idx pairs, or files or folders of text: one loss for each"
    )
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer (default: that of --model)")
    parser.add_argument("--tokens", type=int, default=65536, metavar="N", help="of each of --data (default: %(default)s)")
    parser.add_argument(
        "--sequence-length",
        type=int,
        metavar="N",
        help="of a piece of a document (default, and at most without a window: what the model takes)",
    )
    parser.add_argument("--local-tokens", type=int, metavar="N", help="see only the first and so many of the last tokens (default: all)")
    parser.add_argument("--global-tokens", type=int, metavar="N", help="of the first tokens with --local-tokens (default: 16)")
    parser.add_argument(
        "--position-buckets",
        type=int,
        nargs="*",
        default=EvaluationOptions().position_buckets,
        metavar="N",
        help="positions at which a new bucket begins (default: %(default)s)",
    )
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="tasks of lm-eval")
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="folder of further task definitions")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question (default: what the task says)")
    parser.add_argument("--limit", type=int, metavar="N", help="questions of each task at most")
    parser.add_argument(
        "--tokens-per-pack", type=int, default=8192, metavar="N", help="most tokens of a pack of prompts (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("evaluation.json"), metavar="FILE", help="JSON (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
