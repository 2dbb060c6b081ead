"""What ``--dry-run`` prints."""

from collections.abc import Callable

import yaml

from megatron_ext.config import RunConfig, dump_config, summary

Load = Callable[..., RunConfig]


def test_summary_shows_configuration_budget_and_layout(load: Load) -> None:
    config = load("train={tokens: 1e6}")
    text = summary(config, "pp 1 x dp 2 x tp 1", parameters=1_234_567)
    resolved, budget = text.split("\n\n")
    assert yaml.safe_load(resolved) == yaml.safe_load(dump_config(config))
    rows = dict(line.split("  ", 1) for line in budget.splitlines())
    assert {name: value.strip() for name, value in rows.items()} == {
        "steps": "977",
        "tokens per step": "1,024 at most",
        "token budget": "1,000,448 at most",
        "sequence length": "128 tokens",
        "pack": "128 tokens at most",
        "parameters": "1,234,567",
        "layout": "pp 1 x dp 2 x tp 1, policy data_parallel",
    }


def test_summary_says_what_it_does_not_know(load: Load) -> None:
    text = summary(load("planning.tokens_per_pack=4096"), "pp 1 x dp 1 x tp 1", parameters=None)
    assert "parameters       unknown before the model is read" in text
    assert "pp 1 x dp 1 x tp 1," in text
    assert "pack             4,096 tokens at most" in text
