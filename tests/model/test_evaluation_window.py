"""A model that sees the first and last tokens of a document, against attention written out by hand."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_ext.model.attention import Attention
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.model.rope_scaling import RopeScaling, rope_frequencies
from megatron_ext.model.window_options import WindowOptions
from megatron_ext.option_rules import OptionError

CONFIG = ModelConfig(32, 16, 24, 2, 4, 2, 4, 64, init_std=0.4)
YARN = replace(CONFIG, rope=RopeScaling("yarn", 4.0, 8, attention_factor=1.3))
ENDS = torch.tensor([0, 7, 33, 45], dtype=torch.int32)
WINDOW = WindowOptions(local_tokens=9, global_tokens=3, max_distance=11)


def build(config: ModelConfig, window: WindowOptions | None) -> GPT:
    model = GPT(config, "dense").double()
    model.reset_parameters(0)
    model.window = window
    return model


@torch.no_grad()
def logits(model: GPT) -> Tensor:
    tokens = torch.randint(0, CONFIG.vocab_size, (45,), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(b - a) for a, b in zip(ENDS[:-1].tolist(), ENDS[1:].tolist(), strict=True)])
    return model.logits(tokens, positions, ENDS, 26)


def turned(x: Tensor, distance: int, config: ModelConfig) -> Tensor:
    """A head [D] turned by one position after another."""
    angle = distance * rope_frequencies(config.head_dim, config.rope_theta, config.rope, torch.float64)
    a, b = x.chunk(2)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


@torch.no_grad()
def by_hand(attention: Attention, x: Tensor, config: ModelConfig, window: WindowOptions) -> Tensor:
    """Attention of one document ``x`` [T, hidden], a query and a head at a time."""
    q, k, v = (linear(x).unflatten(-1, (-1, config.head_dim)) for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
    out = torch.zeros_like(q)
    for i in range(len(x)):
        keys = [j for j in range(i + 1) if j < window.global_tokens or i - j < window.local_tokens]
        for head in range(config.num_heads):
            of = head * config.num_kv_heads // config.num_heads
            logits = [turned(q[i, head], min(i - j, window.longest_distance), config) @ k[j, of] for j in keys]
            factor = config.rope.attention_factor**2 / config.head_dim**0.5
            out[i, head] = (torch.stack(logits) * factor).softmax(0) @ v[keys, of]
    return attention.o_proj(out.flatten(1))


@pytest.mark.parametrize("config", [CONFIG, YARN], ids=["plain", "yarn"])
def test_attention_equals_loops(config: ModelConfig) -> None:
    model = build(config, WINDOW)
    attention = model.model.layers["0"].self_attn
    x = torch.randn(26, config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pack = model.context(torch.arange(26), torch.tensor([0, 26], dtype=torch.int32), 26)
    with torch.no_grad():
        torch.testing.assert_close(attention(x, pack), by_hand(attention, x, config, WINDOW), rtol=1e-10, atol=1e-10)


def test_documents_within_the_window_are_untouched_and_others_see_less() -> None:
    plain = logits(build(CONFIG, None))
    assert torch.equal(logits(build(CONFIG, WindowOptions(26))), plain), "no document is longer"
    seen = (logits(build(CONFIG, WINDOW)) - plain).abs().amax(1)
    assert bool((seen[[*range(19), *range(33, 45)]] < 1e-12).all()), "queries that see all"
    assert bool((seen[19:33] > 1e-6).all()), "queries beyond the window"


def test_the_window_is_there_in_the_context_alone() -> None:
    model = build(CONFIG, None)
    plain, windowed = logits(model), logits(build(CONFIG, WINDOW))
    with pytest.raises(KeyError), model.seeing(WINDOW):
        assert torch.equal(logits(model), windowed)
        raise KeyError
    assert torch.equal(logits(model), plain)


def test_documents_stay_apart() -> None:
    model, changed = build(CONFIG, WINDOW), build(CONFIG, WINDOW)
    tokens = torch.randint(0, CONFIG.vocab_size, (45,), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(n) for n in ENDS.diff().tolist()])
    other = tokens.clone()
    other[8] = (other[8] + 1) % CONFIG.vocab_size
    with torch.no_grad():
        difference = (model.logits(tokens, positions, ENDS, 26) - changed.logits(other, positions, ENDS, 26)).abs().amax(1)
    assert bool((difference[:8] == 0).all()) and bool((difference[33:] == 0).all()) and bool((difference[8:33] > 0).all())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"local_tokens": 0}, r"local_tokens: 0; accepted: at least 1"),
        ({"local_tokens": 4, "global_tokens": -1}, r"global_tokens: -1; accepted: at least 0"),
        ({"local_tokens": 4, "max_distance": 3}, r"max_distance: 3; accepted: at least local_tokens \(4\), or null"),
    ],
)
def test_windows_that_mean_nothing_are_refused(keys: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        WindowOptions(**keys)
