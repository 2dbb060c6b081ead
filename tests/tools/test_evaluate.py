"""The command line that evaluates checkpoints, against transformers, and its way to lm-eval."""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from megatron_ext.data.tokenizer import load_tokenizer
from tests.tools.loading import load_tool
from tests.train.text_model import MOST, TEXTS, save_text_model

ADAPTER = "megatron_ext.train.lm_eval_model"
INSTALLED = importlib.util.find_spec("lm_eval") is not None


@pytest.fixture(scope="module")
def run() -> Callable[..., int]:
    """The tool as a function of its command line."""
    module = load_tool("evaluate")
    return lambda *words: module.main([str(word) for word in words])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_model(tmp_path_factory.mktemp("model"))


@torch.no_grad()
def plainly(directory: Path, cut: int) -> list[list[float]]:
    """Token losses of the texts in pieces of ``cut`` tokens, at positions below 5 and from 5 on."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), load_tokenizer(directory)
    found: list[list[float]] = [[], []]
    for text in TEXTS:
        ids = torch.tensor([*tokenizer.encode(text).tolist(), tokenizer.eod_id])
        for start in range(0, len(ids), cut):
            piece = ids[start : start + cut + 1]
            logits = model(piece[None, :cut]).logits[0, : len(piece) - 1]
            for position, loss in enumerate(F.cross_entropy(logits, piece[1:], reduction="none").tolist()):
                found[position >= 5].append(loss)
    return found


def test_losses_and_perplexities_are_those_of_transformers(
    run: Callable[..., int], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, text = tmp_path / "result.json", model / "text.jsonl"
    words = ("--model", model, "--output", output, "--position-buckets", 5, "--data", text, text)
    for cut, options in ((MOST, ()), (16, ("--sequence-length", 16))):
        assert run(*words, *options) == 0
        near, far = plainly(model, cut)
        losses = json.loads(output.read_text())["losses"]
        assert len(losses) == 2 and losses[0] == losses[1]
        mean = (sum(near) + sum(far)) / (len(near) + len(far))
        assert losses[0]["tokens"] == len(near) + len(far) and losses[0]["loss"] == pytest.approx(mean, rel=1e-5)
        assert losses[0]["perplexity"] == pytest.approx(torch.tensor(mean).exp().item(), rel=1e-4)
        assert [bucket["loss"] for bucket in losses[0]["by_position"]] == pytest.approx(
            [sum(each) / len(each) for each in (near, far)], rel=1e-5
        )
        assert f"{mean:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing to evaluate; accepted: --data, --tasks, or both"),
        (("--data", "nowhere"), "nowhere: accepted are the prefix of a .bin/.idx pair"),
        (("--data", "x", "--position-buckets", "5", "5"), "position_buckets: [5, 5]; accepted: positions from 1 up, ascending"),
        (("--data", "x", "--tokens", "0"), "tokens: 0; accepted: at least 1"),
        (("--data", "x", "--sequence-length", "1"), "--sequence-length 1 --tokens-per-pack 8192; accepted: at least 2"),
        (("--data", "x", "--output", "nowhere/result.json"), "there is no directory nowhere"),
    ],
)
def test_errors_say_what_is_accepted(
    words: tuple[str, ...], message: str, run: Callable[..., int], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--model", model, "--output", tmp_path / "result.json", *words) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "result.json").exists()


def test_without_lm_eval_the_extra_is_named(
    run: Callable[..., int], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run("--model", model, "--output", tmp_path / "result.json", "--tasks", "arc_easy") == 1
    assert "--tasks needs lm-eval: pip install 'megatron_ext[eval]'" in capsys.readouterr().err


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A stand-in with the functions of lm-eval that the tool calls; yields what it was asked for."""
    asked: dict[str, Any] = {}
    names = ("lm_eval", "lm_eval.tasks", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.instance")
    modules = {name: ModuleType(name) for name in names}

    class TaskManager:
        def __init__(self, include_path: str | None) -> None:
            asked["include_path"] = include_path

        def match_tasks(self, tasks: list[str]) -> list[str]:
            return [task for task in tasks if task == "own"]

    def simple_evaluate(**arguments: Any) -> dict[str, Any]:
        asked.update(arguments)
        request = modules["lm_eval.api.instance"].Instance()
        request.args = ("the quick", " brown fox")
        [(value, _)] = arguments["model"].loglikelihood([request])
        return {"results": {"own": {"alias": "own", "acc,none": 0.5, "acc_stderr,none": 0.125, "value,none": value}}}

    modules["lm_eval"].simple_evaluate, modules["lm_eval.tasks"].TaskManager = simple_evaluate, TaskManager
    modules["lm_eval.api.model"].LM = type("LM", (), {})
    modules["lm_eval.api.instance"].Instance = type("Instance", (), {})
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules.pop(ADAPTER, None)
    yield asked
    sys.modules.pop(ADAPTER, None)


def test_tasks_are_run_with_the_packed_model(
    run: Callable[..., int], model: Path, tmp_path: Path, lm_eval: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", model, "--output", tmp_path / "result.json", "--include-path", tmp_path, "--limit", 3, "--num-fewshot", 2)
    assert run(*words, "--tasks", "other") == 1
    assert "--tasks other: lm-eval knows no such task" in capsys.readouterr().err
    assert run(*words, "--tasks", "own") == 0
    assert (lm_eval["tasks"], lm_eval["limit"], lm_eval["num_fewshot"], lm_eval["include_path"]) == (["own"], 3, 2, str(tmp_path))
    tasks = json.loads((tmp_path / "result.json").read_text())["tasks"]
    assert tasks["own"]["acc,none"] == 0.5 and tasks["own"]["value,none"] < -1
    assert {"0.5000", "0.1250"} <= set(capsys.readouterr().out.replace("\u2502", " ").split())


TASK = """
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: " "
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 1}
"""


@pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed: the extra [eval] has it")
def test_a_task_of_ones_own_runs_in_lm_eval(run: Callable[..., int], model: Path, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    questions = [{"question": f"line {n}: the quick", "choices": ["brown fox", "lazy dogs again"], "answer": n % 2} for n in range(10)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    (tmp_path / "own.yaml").write_text(TASK.replace("QUESTIONS", str(tmp_path / "questions.jsonl")))
    words = ("--model", model, "--output", tmp_path / "result.json", "--include-path", tmp_path, "--tasks", "own")
    assert run(*words) == 0
    mine = json.loads((tmp_path / "result.json").read_text())["tasks"]["own"]
    arguments = {"pretrained": str(model), "device": "cpu", "dtype": "float32"}
    manager = TaskManager(include_path=str(tmp_path))
    theirs = lm_eval.simple_evaluate(model="hf", model_args=arguments, tasks=["own"], task_manager=manager, log_samples=False)
    for metric in ("acc,none", "acc_norm,none"):
        assert mine[metric] == theirs["results"]["own"][metric]
