"""Prompts of uneven length packed into few forward passes (Prepacking: Zhao et al. 2024, arXiv:2404.09529).

Each prompt attends to itself and counts its positions from 0, so that a pack gives what its prompts give one at a time; nothing is padded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_ext.data.batch import PackedBatch
from megatron_ext.model.gpt import GPT
from megatron_ext.planning.packing import best_fit_decreasing
from megatron_ext.train.scores import ScoreSums

Tokens = Sequence[int]


@dataclass(frozen=True)
class ContinuationScore:
    """How likely a continuation is after its context."""

    log_likelihood: float
    """Sum over the tokens of the continuation, in nats."""
    is_greedy: bool
    """Every token of it is the likeliest after the context and the tokens before it."""


@torch.no_grad()
def continuation_scores(model: GPT, requests: Sequence[tuple[Tokens, Tokens]], tokens_per_pack: int) -> list[ContinuationScore]:
    """The score of each continuation.

    Args:
        model: whole, in evaluation mode.
        requests: contexts of at least one token, and continuations.
        tokens_per_pack: most tokens of a forward pass; a longer request has one of its own.
    """
    assert all(len(context) for context, _ in requests), "a context has at least one token"
    device = next(model.parameters()).device
    read = [np.array([*context, *continuation][:-1], dtype=np.int64) for context, continuation in requests]
    scores = ScoreSums(model, len(requests))
    with scores.watching():
        for members in _packs([len(tokens) for tokens in read], tokens_per_pack):
            batch = _scored_batch(members, read, requests).to(device)
            scores.add(model(*batch.model_inputs)[1], batch.loss_weight, batch.sources)
    loss, _, hits = scores.values.tolist()
    lengths = [len(continuation) for _, continuation in requests]
    return [ContinuationScore(-nats, hit == length) for nats, hit, length in zip(loss, hits, lengths, strict=True)]


@torch.no_grad()
def next_token_logits(model: GPT, prompts: Sequence[Tokens], tokens_per_pack: int) -> Tensor:
    """Logits [prompts, V] of what follows each prompt of at least one token, in the dtype of the model; see ``continuation_scores``."""
    device = next(model.parameters()).device
    logits = torch.empty(len(prompts), model.config.vocab_size, dtype=next(model.parameters()).dtype, device=device)
    arrays = [np.array(prompt, dtype=np.int64) for prompt in prompts]
    for members in _packs([len(prompt) for prompt in prompts], tokens_per_pack):
        batch = _batch(members, arrays).to(device)
        logits[members] = model.logits(*batch.model_inputs[:4], places=batch.cu_seqlens[1:].long() - 1)
    return logits


def continue_greedily(
    model: GPT,
    prompts: Sequence[Tokens],
    most_tokens: Sequence[int],
    is_complete: Callable[[int, list[int]], bool],
    tokens_per_pack: int,
) -> list[list[int]]:
    """Continue each prompt by its likeliest tokens, all of them together. There is no cache: each token reads its whole prompt again.

    Args:
        model: whole, in evaluation mode.
        prompts: each of at least one token.
        most_tokens: new tokens of each prompt at most.
        is_complete: whether the prompt of a number ends here, after these new tokens.
        tokens_per_pack: as in ``continuation_scores``.

    Returns:
        The new tokens of each prompt.
    """
    new: list[list[int]] = [[] for _ in prompts]
    going = [number for number, most in enumerate(most_tokens) if most > 0]
    while going:
        logits = next_token_logits(model, [[*prompts[number], *new[number]] for number in going], tokens_per_pack)
        for number, token in zip(going, logits.argmax(1).tolist(), strict=True):
            new[number].append(token)
        going = [number for number in going if len(new[number]) < most_tokens[number] and not is_complete(number, new[number])]
    return new


def rolling_windows(tokens: Tokens, prefix: int, most: int) -> list[tuple[Tokens, Tokens]]:
    """(context, continuation) pairs that together predict every token of ``tokens`` once, each reading at most ``most`` tokens.

    The first window begins behind ``prefix``; each further one ends ``most`` tokens later, the last one at the end, with what was predicted
    already as its context.
    """
    text = [prefix, *tokens]
    windows = []
    for start in range(1, len(text), most):
        stop = min(start + most, len(text))
        windows.append((text[max(0, stop - 1 - most) : start], text[start:stop]))
    return windows


def _packs(lengths: Sequence[int], tokens_per_pack: int) -> list[list[int]]:
    """Numbers of prompts by pack, those of one length in their order; what is longer than a pack is alone."""
    alone = [[number] for number, length in enumerate(lengths) if length > tokens_per_pack]
    short = [number for number, length in enumerate(lengths) if length <= tokens_per_pack]
    shared = best_fit_decreasing([lengths[number] for number in short], tokens_per_pack)
    return alone + [[short[place] for place in pack] for pack in shared]


def _batch(members: Sequence[int], read: Sequence[np.ndarray]) -> PackedBatch:
    """The packed ``members`` of ``read``, without labels; the source of a token is the number of its prompt."""
    lengths = [len(read[number]) for number in members]
    total = sum(lengths)
    return PackedBatch(
        tokens=torch.from_numpy(np.concatenate([read[number] for number in members])),
        labels=torch.zeros(total, dtype=torch.int64),
        positions=torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        loss_weight=torch.zeros(total),
        sources=torch.tensor(members).repeat_interleave(torch.tensor(lengths)),
        max_seqlen=max(lengths),
    )


def _scored_batch(members: Sequence[int], read: Sequence[np.ndarray], requests: Sequence[tuple[Tokens, Tokens]]) -> PackedBatch:
    """As ``_batch``, with the tokens of continuations as labels of weight 1."""
    batch = _batch(members, read)
    for number, end in zip(members, batch.cu_seqlens[1:].tolist(), strict=True):
        continuation = requests[number][1]
        batch.labels[end - len(continuation) : end] = torch.tensor(continuation, dtype=torch.int64)
        batch.loss_weight[end - len(continuation) : end] = 1.0
    return batch
