"""Packed prompts give what they give alone, and what transformers gives."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_ext.model.gpt import GPT
from megatron_ext.train.prompt_evaluation import continuation_scores, continue_greedily, next_token_logits, rolling_windows
from megatron_ext.train.quantized_model import build_rotated, read_weights
from tests.train.text_model import save_text_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_model(tmp_path_factory.mktemp("model"))


def ours(folder: Path, dtype: torch.dtype) -> GPT:
    return build_rotated(*read_weights(folder), "none", 0, CPU, dtype)


def prompts(count: int = 40, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    lengths = np.clip(generator.lognormal(2, 1, count).astype(int), 1, 80)
    return [generator.integers(512, size=length).tolist() for length in lengths]


def requests() -> list[tuple[list[int], list[int]]]:
    return [(prompt, continuation[:7]) for prompt, continuation in zip(prompts(), prompts(seed=1), strict=True)]


@pytest.fixture(scope="module")
def reference(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def theirs(reference: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    return reference(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("tokens_per_pack", [64, 1000])
def test_logits_are_those_of_single_prompts(
    folder: Path, reference: PreTrainedModel, dtype: torch.dtype, limit: float, tokens_per_pack: int
) -> None:
    model = ours(folder, dtype)
    packed = next_token_logits(model, prompts(), tokens_per_pack)
    alone = torch.cat([next_token_logits(model, [prompt], tokens_per_pack) for prompt in prompts()])
    assert packed.shape == (40, 512) and packed.dtype == dtype
    assert (packed - alone).abs().max() < limit * alone.abs().max()
    whole = theirs(reference, prompts()[0])[-1]
    assert (packed[0] - whole).abs().max() < 1e-5 * whole.abs().max()
    assert (packed - next_token_logits(model, [prompt[1:] or [3] for prompt in prompts()], 1000)).abs().max() > 0.1


def test_scores_are_those_of_transformers(folder: Path, reference: PreTrainedModel) -> None:
    model = ours(folder, torch.float32)
    asked = [*requests(), *((prompt, [int(theirs(reference, prompt)[-1].argmax())]) for prompt in prompts()[:3])]
    found = continuation_scores(model, asked, 200)
    for (context, continuation), score in zip(asked, found, strict=True):
        log_probabilities = theirs(reference, context + continuation).log_softmax(1)[len(context) - 1 : -1]
        labels = torch.tensor(continuation)
        assert score.log_likelihood == pytest.approx(float(log_probabilities.gather(1, labels[:, None]).sum()), rel=1e-5)
        assert score.is_greedy == torch.equal(log_probabilities.argmax(1), labels)
    assert [score.is_greedy for score in found[-3:]] == [True] * 3 and not all(score.is_greedy for score in found)


@pytest.mark.parametrize("tokens_per_pack", [4, 64])
def test_scores_do_not_depend_on_packs(folder: Path, tokens_per_pack: int) -> None:
    model = ours(folder, torch.float64)
    together = continuation_scores(model, requests(), 10**6)
    with mock.patch.object(GPT, "forward", autospec=True, side_effect=GPT.forward) as passes:
        parted = continuation_scores(model, requests(), tokens_per_pack)
    lengths = [len(context) + len(continuation) - 1 for context, continuation in requests()]
    read = [len(call.args[1]) for call in passes.call_args_list]
    assert sum(read) == sum(lengths) and max(read) <= max(tokens_per_pack, *lengths)
    assert len(read) < len(lengths) or tokens_per_pack == 4
    assert [score.log_likelihood for score in parted] == pytest.approx([score.log_likelihood for score in together], rel=1e-10)
    assert continuation_scores(model, [], 64) == []


def test_greedy_continuations_are_those_of_transformers(folder: Path, reference: PreTrainedModel) -> None:
    model = ours(folder, torch.float32)
    most = [0, 1, 5, 8, 8, 3]
    found = continue_greedily(model, prompts()[:6], most, lambda number, new: number == 3 and len(new) == 2, 100)
    assert [len(new) for new in found] == [0, 1, 5, 2, 8, 3]
    for prompt, new in zip(prompts()[:6], found, strict=True):
        if new:
            wanted = reference.generate(torch.tensor([prompt]), max_new_tokens=len(new), do_sample=False, pad_token_id=0, eos_token_id=[])
            assert new == wanted[0, len(prompt) :].tolist()


def test_rolling_windows_predict_each_token_once_with_all_the_context_that_fits() -> None:
    windows = rolling_windows(list(range(10)), 99, 4)
    assert windows == [([99], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    assert rolling_windows([], 99, 4) == [] and rolling_windows([7], 99, 4) == [([99], [7])]
    for count in range(1, 30):
        for most in range(1, 12):
            windows = rolling_windows(list(range(count)), 99, most)
            assert [token for _, continuation in windows for token in continuation] == list(range(count))
            assert all(1 <= len(context) and len(context) + len(continuation) - 1 <= most for context, continuation in windows)
