"""Log-likelihoods of continuations of uneven prompts: packed, and in padded batches through transformers, in turn in one run.

    python tools/bench_prepacking.py --prompts 64 --median 100

All ways get the same prompts, weights and tokens of a forward pass, padding included; the likelihoods are compared first. The last way
computes logits of continuations only, as the packed one does, so that what is left is padding.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from bench_ranks import print_ratios
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megatron_ext.checkpoint.hf_config import config_to_hf
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.train.prompt_evaluation import continuation_scores

Request = tuple[list[int], list[int]]
OURS = "megatron_ext, packed"


def drawn_requests(count: int, median: float, spread: float, longest: int, vocab_size: int) -> list[Request]:
    """Prompts with log-normal lengths, of at most ``longest`` tokens with their continuations of 1 to 8 tokens."""
    generator = np.random.default_rng(0)
    lengths = np.clip(median * np.exp(spread * generator.standard_normal(count)), 1, longest - 8).astype(int)
    continuations = generator.integers(1, 9, count)
    return [tuple(generator.integers(vocab_size, size=n).tolist() for n in pair) for pair in zip(lengths, continuations, strict=True)]


def batches(lengths: Sequence[int], order: Sequence[int], most: int) -> list[list[int]]:
    """Numbers of requests in ``order``, as many in a batch as have at most ``most`` tokens with their padding."""
    found: list[list[int]] = []
    for number in order:
        last = [*found[-1], number] if found else []
        if last and len(last) * max(lengths[each] for each in last) <= most:
            found[-1] = last
        else:
            found.append([number])
    return found


@torch.no_grad()
def padded_scores(model: PreTrainedModel, requests: Sequence[Request], most: int, is_sorted: bool, only_labelled: bool) -> list[float]:
    """As ``continuation_scores``, by transformers in batches that are padded at the right."""
    lengths = [len(context) + len(continuation) - 1 for context, continuation in requests]
    order = sorted(range(len(requests)), key=lambda number: -lengths[number] if is_sorted else 0)
    scores = [0.0] * len(requests)
    for members in batches(lengths, order, most):
        ids = torch.zeros(len(members), max(lengths[number] for number in members), dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, number in enumerate(members):
            context, continuation = requests[number]
            ids[row, : lengths[number]] = torch.tensor([*context, *continuation][:-1])
            mask[row, : lengths[number]] = 1
            labels[row, len(context) - 1 : lengths[number]] = torch.tensor(continuation)
        if only_labelled:
            logits = model.lm_head(model.model(input_ids=ids, attention_mask=mask).last_hidden_state[labels >= 0])
        else:
            logits = model(input_ids=ids, attention_mask=mask).logits[labels >= 0]
        losses = torch.nn.functional.cross_entropy(logits.float(), labels[labels >= 0], reduction="none")
        for number, part in zip(members, losses.split((labels >= 0).sum(1).tolist()), strict=True):
            scores[number] = -float(part.sum())
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--median", type=float, default=100, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument(
        "--spread", type=float, default=1.0, help="standard deviation of the logarithm of the length (default: %(default)s)"
    )
    parser.add_argument("--tokens-per-pack", type=int, default=2048, help="of a forward pass, padding included (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    width, most = arguments.hidden_size, arguments.tokens_per_pack
    config = ModelConfig(arguments.vocab_size, width, 3 * width, arguments.layers, width // 32, width // 64, 32, most)
    ours = GPT(config).eval()
    ours.reset_parameters(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_to_hf(config, dtype="float32"))).eval()
    theirs.load_state_dict(ours.state_dict())
    requests = drawn_requests(arguments.prompts, arguments.median, arguments.spread, most, config.vocab_size)
    ways: dict[str, Callable[[], list[float]]] = {
        OURS: lambda: [score.log_likelihood for score in continuation_scores(ours, requests, most)],
        "transformers, padded": lambda: padded_scores(theirs, requests, most, False, False),
        "transformers, sorted, padded": lambda: padded_scores(theirs, requests, most, True, False),
        "the same, needed logits only": lambda: padded_scores(theirs, requests, most, True, True),
    }
    expected = ways[OURS]()
    for name, way in ways.items():
        np.testing.assert_allclose(way(), expected, rtol=1e-4, err_msg=name)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - begin)
    tokens = sum(len(context) + len(continuation) - 1 for context, continuation in requests)
    title = f"{len(requests)} prompts, {tokens:,} tokens, at most {most:,} in a forward pass, {config.num_parameters():,} parameters"
    print_ratios(title, "way", OURS, seconds, "seconds", "less")


if __name__ == "__main__":
    main()
