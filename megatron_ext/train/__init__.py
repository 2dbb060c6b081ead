"""The run: build, loop, metrics, console, evaluation, stopping."""

from megatron_ext.train.dry_run import dry_run
from megatron_ext.train.run import pretrain

__all__ = ["dry_run", "pretrain"]
