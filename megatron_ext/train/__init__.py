"""The run: build, loop, metrics, console, evaluation, stopping."""

from megatron_ext.train.run import dry_run, pretrain

__all__ = ["dry_run", "pretrain"]
