"""Largest attention logits: against a loop over all pairs, in bounded memory, outside any graph."""

import math
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.max_logits import dense, max_attention_logits, max_chunk_logits

PACKS = [[3, 0, 1, 40, 7, 40, 0], [0, 0, 61], [1] * 30, [29, 1, 1, 1, 300, 2, 0, 5], [16] * 20]
HEADS = [(4, 4, 8), (6, 2, 5), (3, 1, 1)]


def make(lengths: list[int], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q, k and the borders of the documents."""
    generator = torch.Generator().manual_seed(sum(lengths))
    q, k = (torch.randn(sum(lengths), n, head_dim, generator=generator, dtype=torch.float64).to(dtype) for n in (heads, kv_heads))
    return [q, k, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)]


def by_pairs(q: torch.Tensor, k: torch.Tensor, lengths: list[int], causal: bool) -> list[float]:
    """The largest logit of each head, one pair of tokens after the other."""
    largest, start = [-math.inf] * q.shape[1], 0
    for length in lengths:
        for query in range(start, start + length):
            for key in range(start, query + 1 if causal else start + length):
                for head in range(q.shape[1]):
                    logit = float(q[query, head] @ k[key, head // (q.shape[1] // k.shape[1])]) / q.shape[-1] ** 0.5
                    largest[head] = max(largest[head], logit)
        start += length
    return largest


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_the_definition_is_the_largest_over_all_pairs(heads: int, kv_heads: int, head_dim: int, causal: bool) -> None:
    lengths = [3, 0, 1, 9, 2, 9, 0]
    q, k, cu_seqlens = make(lengths, heads, kv_heads, head_dim)
    expected = torch.tensor(by_pairs(q, k, lengths, causal), dtype=torch.float64)
    torch.testing.assert_close(dense(q, k, cu_seqlens, causal), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("chunk", [1, 7, 16, 64, None])
def test_tiles_give_the_definition(chunk: int | None, heads: int, kv_heads: int, head_dim: int, causal: bool) -> None:
    for lengths in PACKS if chunk != 1 else [[3, 0, 1, 9, 0]]:
        q, k, cu_seqlens = make(lengths, heads, kv_heads, head_dim)
        found = max_attention_logits(q, k, cu_seqlens, causal=causal, chunk=chunk)
        torch.testing.assert_close(found, dense(q, k, cu_seqlens, causal), rtol=1e-14, atol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_every_pair_counts_and_no_other(causal: bool) -> None:
    """One large product at a time: it is seen if its pair attends, wherever in a tile it lies."""
    lengths, draw = [5, 1, 40, 2, 17, 9, 3], random.Random(0)
    document = [number for number, length in enumerate(lengths) for _ in range(length)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    seen = []
    for _ in range(200):
        query, key = draw.randrange(len(document)), draw.randrange(len(document))
        q, k = torch.zeros(len(document), 2, 3), torch.zeros(len(document), 1, 3)
        q[query, 1], k[key] = 1.0, 5.0
        attends = document[query] == document[key] and (key <= query or not causal)
        seen.append(attends)
        found = max_attention_logits(q, k, cu_seqlens, causal=causal, scale=2.0, chunk=draw.choice([4, 16, 40]))
        assert found.tolist() == [0.0, 30.0 if attends else 0.0], (query, key)
    assert 0.1 < sum(seen) / len(seen) < 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_summed_and_kept_in_float32(dtype: torch.dtype) -> None:
    q, k, cu_seqlens = make(PACKS[3], 8, 2, 64, dtype)
    found = max_attention_logits(q, k, cu_seqlens)
    assert found.dtype == torch.float32
    exact = dense(q.double(), k.double(), cu_seqlens)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
    assert not torch.equal(found, found.to(torch.bfloat16).float())


def test_chunks_of_keys_are_merged_by_maximum() -> None:
    """A document whose queries meet its keys in three parts, as in a ring."""
    q, k, cu_seqlens = make([50], 6, 3, 8)
    parts = [
        max_chunk_logits(q[20:], k[20:], True, chunk=8),
        max_chunk_logits(q[20:], k[:20], False, chunk=8),
        max_chunk_logits(q[:20], k[:20], True),
    ]
    merged = torch.stack(parts).amax(0)
    torch.testing.assert_close(merged, dense(q, k, cu_seqlens), rtol=1e-14, atol=0)
    assert not torch.equal(torch.stack(parts[::2]).amax(0), merged), "the control: without the middle part it is another"


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_tokens_have_no_largest(lengths: list[int]) -> None:
    q, k, cu_seqlens = make(lengths, 4, 2, 8, torch.float32)
    nothing = torch.full((4,), -math.inf)
    assert torch.equal(max_attention_logits(q, k, cu_seqlens), nothing)
    assert torch.equal(dense(q, k, cu_seqlens), nothing)
    assert torch.equal(max_chunk_logits(q, torch.ones(3, 2, 8), False), nothing)


def test_nan_is_not_lost() -> None:
    q, k, cu_seqlens = make([20, 9], 4, 2, 8, torch.float32)
    q[25, 1] = math.nan
    assert max_attention_logits(q, k, cu_seqlens, chunk=8).isnan().tolist() == [False, True, False, False]


def test_nothing_is_kept_for_backward() -> None:
    q, k, cu_seqlens = make([20, 9], 4, 2, 8, torch.float32)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        found = max_attention_logits(q.requires_grad_(), k.requires_grad_(), cu_seqlens)
    assert not found.requires_grad
    assert not saved


class Sizes(TorchDispatchMode):
    """Elements of the largest floating-point tensor that an operation makes, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        storages = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and made.is_floating_point() and made.untyped_storage().data_ptr() not in storages:
                self.largest = max(self.largest, made.numel())
        return result


@pytest.mark.parametrize("lengths", [[600], [9] * 70, [300, 5, 5, 300]])
def test_memory_does_not_grow_with_documents(lengths: list[int]) -> None:
    heads, head_dim, chunk = 6, 16, 64
    q, k, cu_seqlens = make(lengths, heads, 2, head_dim, torch.bfloat16)
    with Sizes() as sizes:
        max_attention_logits(q, k, cu_seqlens, chunk=chunk)
    assert heads * 9 * 9 <= sizes.largest <= heads * chunk * max(chunk, head_dim)
    with Sizes() as sizes:
        dense(q, k, cu_seqlens)
    assert sizes.largest >= heads * len(q) ** 2, "the control"


@pytest.mark.parametrize(("keys", "message"), [({"scale": 0.0}, "scale of attention logits is 0.0"), ({"chunk": 0}, "chunk .* is 0")])
def test_what_cannot_be_is_refused(keys: dict[str, float], message: str) -> None:
    q, k, cu_seqlens = make([3], 1, 1, 8)
    with pytest.raises(ConfigError, match=message):
        max_attention_logits(q, k, cu_seqlens, **keys)
    with pytest.raises(ConfigError, match=message):
        max_chunk_logits(q, k, True, **keys)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    for lengths in PACKS:
        q, k, cu_seqlens = (x.cuda() for x in make(lengths, 8, 2, 64, dtype))
        exact = dense(q.double(), k.double(), cu_seqlens)
        torch.testing.assert_close(max_attention_logits(q, k, cu_seqlens).double(), exact, rtol=1e-5, atol=0)
