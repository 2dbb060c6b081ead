"""What a run is: typed schema, YAML file, dotted command-line overrides, clear errors."""

from megatron_ext.config.deepspeed import deepspeed_config, monitor_config
from megatron_ext.config.load import dump_config, load_config
from megatron_ext.config.schema import RunConfig, total_steps
from megatron_ext.config.settings import Change, changes, settings
from megatron_ext.config.summary import summary

__all__ = [
    "Change",
    "RunConfig",
    "changes",
    "deepspeed_config",
    "dump_config",
    "load_config",
    "monitor_config",
    "settings",
    "summary",
    "total_steps",
]
