"""The three kinds of requests of lm-eval. Where lm-eval is installed its own base class and its own model are compared with."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.train.quantized_model import build_rotated, read_weights
from tests.train.text_model import MOST, TEXTS, save_text_model

ADAPTER = "megatron_ext.train.lm_eval_model"
INSTALLED = importlib.util.find_spec("lm_eval") is not None


@dataclass
class Request:
    """What lm-eval hands over, as far as models look at it."""

    args: tuple[Any, ...]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, over lm-eval or over stand-ins of the two classes that it needs."""
    if not INSTALLED:
        model, instance = ModuleType("lm_eval.api.model"), ModuleType("lm_eval.api.instance")
        model.LM, instance.Instance = type("LM", (), {}), Request
        stand_ins = {"lm_eval": ModuleType("lm_eval"), "lm_eval.api": ModuleType("lm_eval.api")}
        for name, module in {**stand_ins, "lm_eval.api.model": model, "lm_eval.api.instance": instance}.items():
            monkeypatch.setitem(sys.modules, name, module)
    sys.modules.pop(ADAPTER, None)
    yield importlib.import_module(ADAPTER)
    sys.modules.pop(ADAPTER, None)


@pytest.fixture
def model(adapter: ModuleType, folder: Path) -> Any:
    gpt = build_rotated(*read_weights(folder), "none", 0, torch.device("cpu"), torch.float32)
    return adapter.PackedModel(gpt, load_tokenizer(folder), 256)


LONG = " ".join(TEXTS)
PAIRS = [
    ("the quick brown", " fox"),
    ("the quick brown ", "fox jumps"),
    ("", "again and again"),
    ("line 3:", " the quick brown fox jumps over 21 lazy dogs"),
    (LONG, " dogs"),
]
GENERATE: list[tuple[str, dict[str, Any]]] = [
    ("the quick", {"until": ["\n\n"], "max_gen_toks": 9, "do_sample": False}),
    ("line 4", {"until": ["e"], "max_gen_toks": 12, "temperature": 0.0}),
    (LONG, {"max_gen_toks": 5}),
]


@pytest.fixture(scope="module")
def reference(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def plainly(reference: PreTrainedModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    tokens = [*context, *continuation][-MOST - 1 :]
    logits = reference(torch.tensor([tokens[:-1]])).logits[0]
    scores, labels = logits.log_softmax(1)[-len(continuation) :], torch.tensor(continuation)
    return float(scores.gather(1, labels[:, None]).sum()), torch.equal(scores.argmax(1), labels)


def test_likelihoods_are_those_of_single_requests(model: Any, folder: Path, reference: PreTrainedModel) -> None:
    tokenizer = load_tokenizer(folder)
    found = model.loglikelihood([Request(pair) for pair in PAIRS])
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        begin = tokenizer.encode(context.rstrip()).tolist()
        rest = tokenizer.encode(context + continuation).tolist()[len(begin) :]
        expected, is_greedy = plainly(reference, begin or [tokenizer.eod_id], rest)
        assert value == pytest.approx(expected, rel=1e-5) and greedy == is_greedy
    assert model.tokenizer_name == str(folder)


def test_texts_longer_than_the_model_takes_are_read_in_windows(model: Any, folder: Path, reference: PreTrainedModel) -> None:
    tokenizer = load_tokenizer(folder)
    tokens = tokenizer.encode(LONG).tolist()
    assert len(tokens) > 2 * MOST
    found = model.loglikelihood_rolling([Request((LONG,)), Request((TEXTS[0],))])
    text = [tokenizer.eod_id, *tokens]
    parts = [
        (text[max(0, stop - 1 - MOST) : start], text[start:stop])
        for start in range(1, len(text), MOST)
        for stop in [min(start + MOST, len(text))]
    ]
    assert found[0] == pytest.approx(sum(plainly(reference, *part)[0] for part in parts), rel=1e-5)
    assert found[1] == pytest.approx(plainly(reference, [tokenizer.eod_id], tokenizer.encode(TEXTS[0]).tolist())[0], rel=1e-5)


def test_generation_is_greedy_and_ends_at_a_stop_word(model: Any, folder: Path, reference: PreTrainedModel) -> None:
    tokenizer = load_tokenizer(folder)
    found = model.generate_until([Request(each) for each in GENERATE])
    for (context, options), text in zip(GENERATE, found, strict=True):
        most = options["max_gen_toks"]
        prompt = torch.from_numpy(tokenizer.encode(context)[-(MOST - most) :].astype("int64"))[None]
        wanted = reference.generate(prompt, max_new_tokens=most, do_sample=False, pad_token_id=0, eos_token_id=tokenizer.eod_id)
        whole = tokenizer.decode(wanted[0, prompt.shape[1] :])
        for stop in options.get("until", []):
            whole = whole.split(stop)[0]
        assert text == whole


@pytest.mark.parametrize("options", [{"do_sample": True, "temperature": 0.8}, {"num_beams": 4}])
def test_samples_and_beams_are_refused(model: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="accepted: greedy decoding"):
        model.generate_until([Request(("a", options))])
    with pytest.raises(ConfigError, match="256 new tokens are wanted; accepted: fewer than the 96"):
        model.generate_until([Request(("a", {}))])
    with pytest.raises(DataError, match=r"a continuation has \d+ tokens; the model takes 96"):
        model.loglikelihood([Request(("a", LONG))])


@pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed: the extra [eval] has it")
def test_lm_evals_own_model_gives_the_same(model: Any, folder: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    other = HFLM(str(folder), device="cpu", dtype="float32", batch_size=2)

    def asked(kind: str, arguments: tuple[Any, ...]) -> Any:
        return Instance(kind, {}, arguments, 0, ("task", 0, 1))

    pairs = [asked("loglikelihood", pair) for pair in PAIRS]
    for mine, theirs in zip(model.loglikelihood(pairs), other.loglikelihood(pairs), strict=True):
        assert mine[0] == pytest.approx(theirs[0], rel=1e-4) and mine[1] == theirs[1]
    texts = [asked("loglikelihood_rolling", (text,)) for text in (LONG, TEXTS[0])]
    assert model.loglikelihood_rolling(texts) == pytest.approx(other.loglikelihood_rolling(texts), rel=1e-4)
    generate = [asked("generate_until", each) for each in GENERATE]
    assert model.generate_until(generate) == other.generate_until(generate)
