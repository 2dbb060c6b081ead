"""What ``--dry-run`` prints: the resolved configuration, the token budget and the layout."""

from megatron_ext.config.load import dump_config
from megatron_ext.config.schema import RunConfig, total_steps


def summary(config: RunConfig, ranks: str, parameters: int | None = None) -> str:
    """Describe a run in plain text; ``ranks`` names its grid, ``parameters`` is the model's size where it is known."""
    steps = total_steps(config)
    tokens = steps * config.data.tokens_per_step
    rows = {
        "steps": f"{steps:,}",
        "tokens per step": f"{config.data.tokens_per_step:,} at most",
        "token budget": f"{tokens:,} at most",
        "sequence length": f"{config.data.longest_sequence:,} tokens",
        "pack": f"{config.planning.tokens_per_pack or config.data.longest_sequence:,} tokens at most",
        "parameters": "unknown before the model is read" if parameters is None else f"{parameters:,}",
        "layout": f"{ranks}, policy {config.planning.policy}",
    }
    width = max(map(len, rows))
    return dump_config(config) + "\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()) + "\n"
